import pytest

from training.data.small import write_lines
from trimtab.errors import ConfigError
from trimtab.training.data.files import find_files

RECORDS = [{"text": "a"}]


def names(found, folder):
    return [str(path.relative_to(folder)) for path in found]


def test_files_globs_and_folders_each_file_once(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "notes.csv", ".hidden.jsonl", "README.md"):
        write_lines(tmp_path / name, RECORDS)
    assert names(find_files(["b.jsonl", "*.jsonl"], tmp_path), tmp_path) == ["b.jsonl", "a.jsonl"]
    assert names(find_files(["."], tmp_path), tmp_path) == ["a.jsonl", "b.jsonl"]
    assert find_files([str(tmp_path / "a.jsonl")], tmp_path / "elsewhere") == [tmp_path / "a.jsonl"]


def test_splits_are_told_by_the_names_of_files_or_folders(tmp_path):
    write_lines(tmp_path / "data/train-00000-of-00001.parquet", RECORDS)
    write_lines(tmp_path / "data/validation-00000-of-00001.parquet", RECORDS)
    write_lines(tmp_path / "test/data-00000.arrow", RECORDS)
    write_lines(tmp_path / "dataset_dict.json", RECORDS)
    assert names(find_files(["."], tmp_path), tmp_path) == ["data/train-00000-of-00001.parquet"]
    assert names(find_files(["."], tmp_path, split="test"), tmp_path) == ["test/data-00000.arrow"]
    assert len(find_files(["."], tmp_path, split="valid")) == 1
    with pytest.raises(ConfigError, match=r"no split 'extra'; set 'split' to test or train or validation"):
        find_files(["."], tmp_path, split="extra")


def test_a_dataset_card_says_what_belongs_to_a_split(tmp_path):
    for name in ("en/one.jsonl", "en/two.jsonl", "de/one.jsonl"):
        write_lines(tmp_path / name, RECORDS)
    card = tmp_path / "README.md"
    card.write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - {split: train, path: en/one.jsonl}\n"
        "  - {split: test, path: en/two.*}\n- config_name: de\n  data_files: de/*.jsonl\n---\n# Words\n"
    )
    with pytest.raises(ConfigError, match="set 'subset' to de or en"):
        find_files(["."], tmp_path)
    assert names(find_files(["."], tmp_path, subset="en"), tmp_path) == ["en/one.jsonl"]
    assert names(find_files(["."], tmp_path, "test", "en"), tmp_path) == ["en/two.jsonl"]
    assert names(find_files(["."], tmp_path, subset="de"), tmp_path) == ["de/one.jsonl"]
    (tmp_path / "en/two.jsonl").unlink()
    assert names(find_files(["."], tmp_path, subset="en"), tmp_path) == ["en/one.jsonl"]
    with pytest.raises(ConfigError, match=r"no file matches .*two\.\*"):
        find_files(["."], tmp_path, "test", "en")
    with pytest.raises(ConfigError, match=r"no subset 'dee'. Did you mean 'de'"):
        find_files(["."], tmp_path, subset="dee")
    card.write_text("---\nconfigs:\n- data_files: [{path: x}]\n---\n")
    with pytest.raises(ConfigError, match="'data_files'"):
        find_files(["."], tmp_path)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "'paths' is empty"),
        (["trian.jsonl"], r"no file or folder .*trian.jsonl. Did you mean 'train.jsonl'"),
        (["*.parquet"], r"no file matches .*\*.parquet"),
        (["notes.csv"], r"notes.csv is of no known kind; data files end with .jsonl"),
        (["empty"], "no data file in the folder"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, paths, message):
    write_lines(tmp_path / "train.jsonl", RECORDS)
    write_lines(tmp_path / "notes.csv", RECORDS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=message):
        find_files(paths, tmp_path)
    with pytest.raises(ConfigError, match="choose within a dataset folder"):
        find_files(["train.jsonl"], tmp_path, split="train")
