"""Stop texts against a brute-force search of the whole text."""

from hypothesis import given
from hypothesis import strategies as st

from trimtab.decoding.stopping import StopChecker


def brute_force(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], stop
    return text, None


def run(pieces: list[str], stops: list[str], include: bool) -> tuple[str, str | None]:
    checker = StopChecker(stops, include)
    shown = ""
    for piece in pieces:
        emitted, matched = checker.push(piece)
        shown += emitted
        if matched is not None:
            return shown, matched
    return shown + checker.flush(), None


letters = st.text(alphabet="abc", max_size=40)
stop_lists = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), min_size=1, max_size=4)


@given(st.lists(st.text(alphabet="abc", max_size=4), max_size=20), stop_lists, st.booleans())
def test_equals_brute_force_however_the_text_is_cut(pieces, stops, include):
    assert run(pieces, stops, include) == brute_force("".join(pieces), stops, include)


@given(letters, stop_lists)
def test_only_possible_beginnings_are_held_back(text, stops):
    checker = StopChecker(stops)
    shown = ""
    for i, char in enumerate(text):
        emitted, matched = checker.push(char)
        shown += emitted
        if matched is not None:
            return
        held = text[len(shown) : i + 1]
        assert shown + held == text[: i + 1]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_a_stop_text_over_many_pieces():
    checker = StopChecker(["</answer>"])
    assert [checker.push(p) for p in ["4", "2<", "/ans", "wer", "> more"]] == [
        ("4", None),
        ("2", None),
        ("", None),
        ("", None),
        ("", "</answer>"),
    ]
    assert checker.push("even more") == ("", "</answer>")
    assert checker.flush() == ""


def test_a_false_start_is_released():
    checker = StopChecker(["\n\n"])
    assert checker.push("a\n") == ("a", None)
    assert checker.push("b") == ("\nb", None)


def test_stop_text_kept_on_request():
    assert run(["one. t", "wo"], ["."], include=True) == ("one.", ".")
    assert run(["one. t", "wo"], ["."], include=False) == ("one", ".")


def test_without_stop_texts_everything_passes():
    checker = StopChecker()
    assert checker.push("anything") == ("anything", None)
    assert checker.flush() == ""
