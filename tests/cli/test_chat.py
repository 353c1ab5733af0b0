"""`trimtab chat`, from a pipe and at a pretended keyboard."""

from __future__ import annotations

import json
import os
import signal

import pytest

import trimtab
from trimtab.cli import chat, common

WORDS = ["chat", "--temperature", "0", "--max-tokens", "40", "--backend", "torch"]
PAUL = "Write as JSON: In Oslo lives Paul Fox, a tailor aged 81."
ROSE = "Write as JSON: In Rome lives Rose Marsh, a baker aged 56."


@pytest.fixture(scope="module")
def engine():
    return trimtab.Engine(backend="torch")


@pytest.fixture
def conversation(engine):
    params = trimtab.SamplingParams(temperature=0, max_tokens=40)
    return chat.Conversation(engine, params, system=None)


def test_each_line_of_a_pipe_is_a_turn(trimtab_cli):
    result = trimtab_cli(*WORDS, stdin=f"{PAUL}\n\n/reset\n{ROSE}\n")
    assert result.exit_code == 0
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["name"] for answer in answers] == ["Paul Fox", "Rose Marsh"]


def test_the_second_turn_finds_the_first_in_the_prefix_cache(conversation, engine):
    conversation.answer(PAUL)
    engine.reset_stats()
    conversation.answer(ROSE)
    assert engine.stats().prefix_hit_tokens > 0
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant", "user", "assistant"]


def test_commands_speak_on_stderr_only(trimtab_cli):
    lines = f"/help\n/system Be brief.\n/system\n{PAUL}\n/stats\n/rest\n/exit\n{ROSE}\n"
    result = trimtab_cli(*WORDS, stdin=lines)
    assert len(result.stdout.splitlines()) == 1
    assert "Paul Fox" in result.stdout
    assert "/system TEXT" in result.stderr
    assert "system message set\nno system message\n" in result.stderr
    assert "1 questions in the history" in result.stderr
    assert "no such command /rest. Did you mean '/reset'" in result.stderr


def test_reset_keeps_the_system_message(conversation):
    conversation.system = "Be brief."
    conversation.turns = [{"role": "user", "content": "x"}]
    chat._obey("/reset", conversation)
    assert (conversation.turns, conversation.system) == ([], "Be brief.")


def test_the_oldest_turns_are_forgotten_when_the_context_is_full(conversation, capsys):
    long = "word " * 600
    for _ in range(4):
        conversation.turns += [{"role": "user", "content": long}, {"role": "assistant", "content": "yes"}]
    conversation.answer(PAUL)
    assert conversation.turns[-2]["content"] == PAUL
    assert conversation.turns[-1]["role"] == "assistant" and conversation.turns[-1]["content"]
    assert len(conversation.turns) < 10
    assert "questions forgotten" in capsys.readouterr().err


def test_a_message_that_cannot_fit_is_refused_and_forgotten(conversation):
    with pytest.raises(trimtab.TrimtabError, match="context is 2048"):
        conversation.answer("word " * 5000)
    assert conversation.turns == []


def test_at_the_keyboard_an_error_does_not_end_the_chat(trimtab_cli, monkeypatch):
    lines = iter(["word " * 5000, PAUL])

    def typed(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(common, "is_piped", lambda: False)
    monkeypatch.setattr("builtins.input", typed)
    result = trimtab_cli(*WORDS)
    assert result.exit_code == 0
    assert "/help lists the commands, Ctrl-D leaves" in result.stderr
    assert "error: the prompt has" in result.stderr
    assert "Paul Fox" in result.stdout


def test_ctrl_c_stops_the_answer_and_not_the_chat(conversation, engine, capsys, monkeypatch):
    whole = trimtab.SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    conversation.params = whole
    stream = engine.stream

    def press_after_two(prompt, params):
        for number, piece in enumerate(stream(prompt, params)):
            if number == 1:
                os.kill(os.getpid(), signal.SIGINT)
            yield piece

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(engine, "stream", press_after_two)
    conversation.answer(PAUL)
    monkeypatch.undo()
    said = capsys.readouterr()
    assert said.err == "stopped\n"
    assert said.out == conversation.turns[-1]["content"] + "\n"
    assert signal.getsignal(signal.SIGINT) is before
    assert engine.stats().kv_bytes_held == 0, "the stopped request kept memory"
    conversation.params = trimtab.SamplingParams(temperature=0, max_tokens=40)
    conversation.reset()
    conversation.answer(PAUL)
    assert "Paul Fox" in conversation.turns[-1]["content"]


def test_a_second_ctrl_c_ends_all():
    with pytest.raises(KeyboardInterrupt), chat._stoppable() as stopped:
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped()
        os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_at_the_prompt_only_reminds(monkeypatch, capsys):
    answers = iter([KeyboardInterrupt, "hello", EOFError])

    def typed(prompt):
        answer = next(answers)
        if isinstance(answer, str):
            return answer
        raise answer

    monkeypatch.setattr("builtins.input", typed)
    assert list(chat._lines(at_keyboard=True)) == ["hello"]
    assert "/exit or Ctrl-D leaves" in capsys.readouterr().err
