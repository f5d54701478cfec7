"""The preprocess command: the published bytes, file names, log lines, and one sentence for each mistake."""

import json
from argparse import Namespace
from collections import Counter

import numpy as np
import pytest

from fairseq.data import Dictionary, data_utils
from fairseq.errors import UserError
from fairseq_cli import preprocess

SPLITS = ("train", "valid", "test")


def arguments(folder, **options):
    nothing = [
        "source_lang",
        "target_lang",
        "trainpref",
        "validpref",
        "testpref",
        "align_suffix",
        "srcdict",
        "tgtdict",
        "alignfile",
    ]
    defaults = {
        **dict.fromkeys(nothing),
        "destdir": str(folder / "bin"),
        **dict.fromkeys(["thresholdsrc", "thresholdtgt"], 0),
        **dict.fromkeys(["nwordssrc", "nwordstgt"], -1),
        **dict.fromkeys(["joined_dictionary", "dict_only"], False),
        **dict.fromkeys(["only_source", "no_progress_bar"], True),
        "dataset_impl": "mmap",
        "padding_factor": 8,
        "workers": 1,
        "task": "translation",
    }
    return Namespace(**{**defaults, **options})


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text").write_text("b a\n\nb c\n")
    (tmp_path / "more").write_text("b x <unk>\n")
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("workers", [1, 3])
def test_golden_folder_byte_for_byte(golden, run_cli, tmp_path, workers, monkeypatch):
    monkeypatch.setattr("fairseq.data.binarization.SMALLEST_PART", 1000)
    prefixes = [word for s in SPLITS for word in (f"--{s}pref", f"text/wiki.{s}.tokens")]
    command = ["--only-source", *prefixes, "--destdir", tmp_path / "bin", "--nwordssrc", 1500, "--workers", workers]
    done = run_cli("preprocess", command, cwd=golden)
    assert done.status == 0, done.stderr
    expected = golden / "data-bin"
    assert names(tmp_path / "bin") == sorted([*names(expected), *(f"{split}.json" for split in SPLITS)])
    for name in names(expected):
        if name != "preprocess.log":
            assert (tmp_path / "bin" / name).read_bytes() == (expected / name).read_bytes(), name
    log = (tmp_path / "bin" / "preprocess.log").read_text().splitlines()
    assert log[1:-1] == (expected / "preprocess.log").read_text().splitlines()[1:-1]
    assert log[0].startswith("Namespace(no_progress_bar=False")
    assert log[-1] == f"Wrote preprocessed data to {tmp_path / 'bin'}"
    assert " | INFO | fairseq_cli.preprocess | [None] Dictionary: 1503 types" in done.stdout


def odd_words(seed):
    """Words of every sort, many with equal counts, most in several parts of the text."""
    rng = np.random.default_rng(seed)
    letters = np.array([*"abé\u4e2d\U0001f600\ufb01\ue000\ufeff\u200b\0"], dtype=object)  # (an array of str drops NUL)
    words = ["".join(rng.choice(letters, rng.integers(1, 14))) for _ in range(300)]
    long = ["x" * 32, "x" * 33, "x" * 32 + "\0", "x" * 31 + "é", "x" * 31 + "\0", "y" * 500]
    nul = ["a\0", "a\0\0", "\0", "\0\0"]
    special = ["<unk>", "</s>", "<s>", "<pad>", "madeupword0001", "e\u0301", "\u00e9"]
    return np.array([*words, *long, *nul, *special], dtype=object)


def test_any_number_of_workers_writes_what_a_plain_loop_would(text, monkeypatch):
    monkeypatch.setattr("fairseq.data.binarization.SMALLEST_PART", 1000)
    rng = np.random.default_rng(0)
    words = odd_words(1)
    lines = [[*rng.choice(words, rng.integers(0, 12)), *words[i : i + 1]] for i in range(len(words))]
    (text / "text").write_text("".join(" ".join(line) + "\n" for line in lines), newline="")
    (text / "more").write_text(" ".join(words[::2]) + " new\n" * 500, newline="")
    for workers in (1, 2, 3):
        options = {"trainpref": str(text / "text"), "validpref": str(text / "more"), "workers": workers}
        preprocess.main(arguments(text, destdir=str(text / f"bin{workers}"), thresholdsrc=3, **options))
    counts = Counter(word for line in lines for word in line if word not in ("<s>", "<pad>", "</s>", "<unk>"))
    assert len(set(counts.values())) < len(counts) / 4, "ties"
    ranked = sorted((word for word in counts if counts[word] >= 3), key=lambda word: (-counts[word], word))
    dictionary = (text / "bin1" / "dict.txt").read_bytes().decode()
    assert dictionary.startswith("".join(f"{word} {counts[word]}\n" for word in ranked))
    number = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *ranked])}
    ids = [[*(number.get(word, 3) for word in line), 2] for line in lines]
    assert [item.tolist() for item in data_utils.load_indexed_dataset(str(text / "bin1" / "train"))] == ids
    for workers in (2, 3):
        assert names(text / f"bin{workers}") == names(text / "bin1")
        for name in set(names(text / "bin1")) - {"preprocess.log"}:
            assert (text / f"bin{workers}" / name).read_bytes() == (text / "bin1" / name).read_bytes(), name
        logs = [(text / f"bin{n}" / "preprocess.log").read_text().splitlines()[1:-1] for n in (1, workers)]
        assert logs[0] == logs[1], "the same counts are reported"


def test_published_example_and_log(text):
    preprocess.main(arguments(text, trainpref=str(text / "text"), validpref=f"{text / 'more'},{text / 'text'}"))
    splits = [f"{split}.{ending}" for split in ("train", "valid", "valid1") for ending in ("bin", "idx", "json")]
    assert names(text / "bin") == sorted(["dict.txt", "preprocess.log", *splits])
    assert (text / "bin" / "dict.txt").read_text() == "b 2\na 1\nc 1\nmadeupword0000 0\n"
    assert (text / "bin" / "train.bin").read_bytes() == bytes.fromhex("0400050002000200040006000200")
    assert (text / "bin" / "train.bin").read_bytes() == (text / "bin" / "valid1.bin").read_bytes()
    log = (text / "bin" / "preprocess.log").read_text()
    assert f"[None] {text / 'text'}: 3 sents, 7 tokens, 0.0% replaced by <unk>" in log
    assert f"[None] {text / 'more'}: 1 sents, 4 tokens, 25.0% replaced by <unk>" in log
    assert "[None] Dictionary: 7 types" in log


def test_an_existing_dictionary_is_refused_or_reused(text):
    args = arguments(text, trainpref=str(text / "text"))
    preprocess.main(args)
    before = (text / "bin" / "train.bin").read_bytes()
    with pytest.raises(FileExistsError, match="dict.txt: a dictionary exists already.*--srcdict"):
        preprocess.main(args)
    args.srcdict = str(text / "bin" / "dict.txt")
    args.padding_factor = 1000
    preprocess.main(args)
    assert (text / "bin" / "train.bin").read_bytes() == before
    assert len(Dictionary.load(args.srcdict)) == 8
    log = (text / "bin" / "preprocess.log").read_text()
    assert log.count("Wrote preprocessed data") == 2


@pytest.mark.parametrize("srcdict", [False, True])
def test_an_interrupted_run_leaves_nothing_half_written_and_can_be_repeated(text, monkeypatch, srcdict):
    (text / "given").write_text("b 2\na 1\n")
    options = {"srcdict": str(text / "given")} if srcdict else {}
    args = arguments(text, trainpref=str(text / "text"), validpref=str(text / "more"), **options)
    with monkeypatch.context() as patch:

        def stop(*_, **__):
            raise KeyboardInterrupt

        patch.setattr(preprocess, "binarize_file", stop)
        with pytest.raises(KeyboardInterrupt):
            preprocess.main(args)
    left = {"dict.txt", "preprocess.log"} if srcdict else {"preprocess.log", "train.bin", "train.idx", "train.json"}
    assert set(names(text / "bin")) == left
    preprocess.main(args)
    fresh = arguments(text, **{**vars(args), "destdir": str(text / "fresh")})
    preprocess.main(fresh)
    for name in set(names(text / "fresh")) - {"preprocess.log"}:
        assert (text / "bin" / name).read_bytes() == (text / "fresh" / name).read_bytes()


@pytest.mark.parametrize("given", [False, True])
def test_a_run_killed_among_its_dictionaries_can_be_repeated(pair, monkeypatch, given):
    """The first of two built dictionaries, or all files but the end of the log, are there: the same command goes on,
    another one refuses to replace what it did not make, and so does the same one after its end."""
    (pair / "given").write_text("b 2\na 1\n")
    options = {"source_lang": "de", "target_lang": "en", "only_source": False, "trainpref": str(pair / "train")}
    options |= {"srcdict": str(pair / "given")} if given else {}
    args, save = arguments(pair, **options), Dictionary.save
    with monkeypatch.context() as patch:

        def save_and_stop(self, path):
            save(self, path)
            if path.endswith("en.txt" if given else "de.txt"):
                raise KeyboardInterrupt

        patch.setattr(Dictionary, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            preprocess.main(args)
    log = (pair / "bin" / "preprocess.log").read_bytes()
    with pytest.raises(FileExistsError, match="a dictionary exists already"):
        preprocess.main(arguments(pair, **options, nwordstgt=1))
    assert (pair / "bin" / "preprocess.log").read_bytes() == log, "what refuses to begin leaves no trace"
    preprocess.main(args)
    preprocess.main(arguments(pair, **options, destdir=str(pair / "fresh")))
    assert names(pair / "bin") == names(pair / "fresh")
    for name in set(names(pair / "fresh")) - {"preprocess.log"}:
        assert (pair / "bin" / name).read_bytes() == (pair / "fresh" / name).read_bytes(), name
    for _ in range(2):
        with pytest.raises(FileExistsError, match="a dictionary exists already"):
            preprocess.main(args)


@pytest.mark.parametrize("impl", ["lazy", "cached"])
def test_legacy_formats(text, impl):
    args = arguments(text, trainpref=str(text / "text"), validpref=str(text / "text"), dataset_impl=impl)
    preprocess.main(args)
    for split in ("train", "valid"):
        dataset = data_utils.load_indexed_dataset(str(text / "bin" / split))
        assert [dataset[i].tolist() for i in range(3)] == [[4, 5, 2], [2], [4, 6, 2]]


def test_raw_copies_the_text_under_a_name_with_languages(text):
    preprocess.main(arguments(text, trainpref=str(text / "text"), dataset_impl="raw"))
    assert names(text / "bin") == ["dict.txt", "preprocess.log", "train.None-None", "train.None-None.json"]
    assert (text / "bin" / "train.None-None").read_bytes() == (text / "text").read_bytes()
    dictionary = Dictionary.load(str(text / "bin" / "dict.txt"))
    for impl in (None, "raw"):  # it is found under the split's name
        dataset = data_utils.load_indexed_dataset(str(text / "bin" / "train"), dictionary, impl)
        assert [dataset[i].tolist() for i in range(3)] == [[4, 5, 2], [2], [4, 6, 2]]


def test_a_byte_order_mark_is_said(text, caplog):
    (text / "text").write_bytes(b"\xef\xbb\xbf" + (text / "text").read_bytes())
    preprocess.main(arguments(text, trainpref=str(text / "text")))
    assert "begins with a byte order mark, which becomes part of its first word" in caplog.text


def test_dictionary_only(text):
    preprocess.main(arguments(text, trainpref=str(text / "text"), dict_only=True, nwordssrc=5, padding_factor=1))
    assert names(text / "bin") == ["dict.txt", "preprocess.log"]
    assert (text / "bin" / "dict.txt").read_text() == "b 2\n"


@pytest.fixture
def pair(tmp_path):
    (tmp_path / "train.de").write_text("a b\nb\n")
    (tmp_path / "train.en").write_text("b c\nc\n")
    (tmp_path / "train.align").write_text("0-0 1-1\n0-0\n")
    return tmp_path


def test_two_languages(pair):
    options = {"source_lang": "de", "target_lang": "en", "only_source": False, "align_suffix": "align"}
    preprocess.main(arguments(pair, trainpref=str(pair / "train"), padding_factor=1, thresholdtgt=2, **options))
    assert (pair / "bin" / "dict.de.txt").read_text() == "b 2\na 1\n"
    assert (pair / "bin" / "dict.en.txt").read_text() == "c 2\n"
    source = data_utils.load_indexed_dataset(str(pair / "bin" / "train.de-en.de"))
    target = data_utils.load_indexed_dataset(str(pair / "bin" / "train.de-en.en"))
    align = data_utils.load_indexed_dataset(str(pair / "bin" / "train.align.de-en"))
    assert [x.tolist() for x in source] == [[5, 4, 2], [4, 2]]
    assert [x.tolist() for x in target] == [[3, 4, 2], [4, 2]]
    assert [x.tolist() for x in align] == [[0, 0, 1, 1], [0, 0]]


def test_joined_dictionary(pair):
    options = {"source_lang": "de", "target_lang": "en", "only_source": False, "joined_dictionary": True}
    preprocess.main(arguments(pair, trainpref=str(pair / "train"), padding_factor=1, **options))
    assert (pair / "bin" / "dict.de.txt").read_text() == "b 3\nc 2\na 1\n"
    assert (pair / "bin" / "dict.en.txt").read_bytes() == (pair / "bin" / "dict.de.txt").read_bytes()
    target = data_utils.load_indexed_dataset(str(pair / "bin" / "train.de-en.en"))
    assert [x.tolist() for x in target] == [[4, 5, 2], [5, 2]]


def test_source_language_alone(pair):
    preprocess.main(arguments(pair, trainpref=str(pair / "train"), source_lang="de"))
    assert "train.de-None.de.bin" in names(pair / "bin")


def test_empty_file(text):
    (text / "empty").touch()
    preprocess.main(arguments(text, trainpref=str(text / "text"), testpref=str(text / "empty")))
    log = (text / "bin" / "preprocess.log").read_text()
    assert f"{text / 'empty'}: 0 sents, 0 tokens, 0.0% replaced" in log
    assert f"{text / 'empty'} is empty" in log and f"{text / 'text'} is empty" not in log
    assert len(data_utils.load_indexed_dataset(str(text / "bin" / "test"))) == 0


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--trainpref", "absent"], "absent: no such file"),
        ([], "--trainpref: found nothing, expected a training text or --srcdict"),
        (["--srcdict", "absent"], "absent: no such file"),
        (["--trainpref", "latin"], "latin: found byte 0xe9 at offset 3, which is not UTF-8"),
        (["--trainpref", "text", "--alignfile", "x"], "--alignfile: found x"),
        (["--trainpref", "text", "--dataset-impl", "tape"], "invalid choice: 'tape'"),
        (["--trainpref", "text", "--workers", "0"], "--workers"),
    ],
)
def test_mistakes_are_one_sentence(text, run_cli, flags, sentence):
    (text / "latin").write_bytes(b"caf\xe9\n")
    done = run_cli("preprocess", ["--only-source", "--destdir", "bin", *flags], cwd=text)
    assert sentence in done.error
    assert not (text / "bin").exists() or names(text / "bin") == ["preprocess.log"]


def test_both_dictionaries_cannot_be_joined(pair):
    args = arguments(pair, only_source=False, joined_dictionary=True, srcdict="a", tgtdict="b")
    with pytest.raises(ValueError, match="--joined-dictionary: found both"):
        preprocess.main(args)


def test_command_of_the_golden_bundle_is_the_one_tested(golden):
    commands = json.loads((golden / "MANIFEST.json").read_text())["build_commands"]
    assert any("preprocess.py --only-source" in c and "--nwordssrc 1500" in c for c in commands)


def test_a_word_too_long_for_the_dictionary_file(text):
    (text / "long").write_text("a b " + "x" * (1 << 20) + " a\n")
    with pytest.raises(UserError, match="a word of 1048576 characters, expected at most"):
        preprocess.main(arguments(text, trainpref=str(text / "long")))
    assert not (text / "bin" / "dict.txt").exists()


ODD = {
    "a mark inside": ("one \ufefftwo\n", "1 byte order marks (U+FEFF), which become part of words"),
    "a second mark": ("\ufeffone\n\ufefftwo\n", "1 byte order marks (U+FEFF), which become part of words"),
    "a NUL": ("o\0ne two three four\n", "1 NUL bytes, which become part of words"),
    "zero-width spaces": ("o\u200bne t\u200bwo\n", "2 zero-width spaces (U+200B), which become part of words"),
    "carriage returns": ("one\rtwo\nthree\r\n", "1 carriage returns that no line feed follows, which end lines"),
}


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("split", ["train", "test", "dict-only", "raw"])
@pytest.mark.parametrize("kind", ODD)
def test_odd_characters_are_said(run_cli, tmp_path, kind, split, workers, monkeypatch):
    monkeypatch.setattr("fairseq.data.binarization.SMALLEST_PART", 8)
    odd, said = ODD[kind]
    (tmp_path / "odd").write_bytes(odd.encode())
    (tmp_path / "plain").write_bytes("one two \u00e9\u201cthree\u201d\u3000four\r\nfive\u2028six\n\n".encode())
    texts = {"test": ["plain", "odd"]}.get(split, ["odd", "plain"])
    words = ["--only-source", "--trainpref", tmp_path / texts[0], "--testpref", tmp_path / texts[1]]
    more = {"dict-only": ["--dict-only"], "raw": ["--dataset-impl", "raw"]}.get(split, [])
    done = run_cli("preprocess", [*words, "--destdir", tmp_path / "bin", "--workers", workers, *more])
    assert done.status == 0, done.stderr
    found = [line for line in done.stdout.splitlines() if " | WARNING | " in line and ": found " in line]
    assert len(found) == 1 and f"{tmp_path / 'odd'}: found {said}" in found[0]


OTHER_ENCODINGS = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "latin-1")


@pytest.mark.parametrize("place", ["--trainpref", "--validpref", "--testpref", "--srcdict"])
@pytest.mark.parametrize("encoding", OTHER_ENCODINGS)
def test_other_encodings_are_refused(run_cli, text, encoding, place):
    wrong = text / "wrong"
    content = "the 7\n\u00e9 5\na 2\n" if place == "--srcdict" else "the old harbour\n\u00e9\n" * 9
    wrong.write_bytes(content.encode(encoding))
    words = {"--trainpref": text / "text", place: wrong}
    done = run_cli("preprocess", ["--only-source", "--destdir", text / "bin", *(w for p in words.items() for w in p)])
    assert f"{wrong}: found" in done.error
    assert not (text / "bin" / "dict.txt").exists()


@pytest.mark.parametrize(("content", "lines"), [("", 0), ("\n", 1), ("one", 1), ("one\r", 1), ("\r\r\n", 2)])
def test_texts_of_no_or_one_token(run_cli, text, content, lines):
    (text / "small").write_bytes(content.encode())
    for split, more in (("train", []), ("test", ["--trainpref", text / "text"])):
        folder = text / split
        words = ["--only-source", f"--{split}pref", text / "small", "--destdir", folder, *more]
        done = run_cli("preprocess", words)
        assert done.status == 0, done.stderr
        assert len(data_utils.load_indexed_dataset(str(folder / split), None)) == lines
        assert ("is empty" in done.stdout) == (not content)


def test_the_overwrite_flag_and_the_bytes_of_a_dictionary_come_back(golden, run_cli, tmp_path):
    specials = "".join(f"{word} 0 #fairseq:overwrite\n" for word in ("<s>", "<pad>", "</s>", "<unk>"))
    for number, content in enumerate(
        (
            specials + (golden / "data-bin" / "dict.txt").read_text(),
            "a 3\nb 2\na 1 #fairseq:overwrite\nc 1\n",
            "#fairseq:overwrite 4\na 3\n",
            "a 3\na 1\n",
            "\ufeffa 3\n",
        )
    ):
        given, folder = tmp_path / f"given{number}", tmp_path / f"bin{number}"
        given.write_text(content, encoding="utf-8")
        words = ["--only-source", "--srcdict", given, "--testpref", golden / "text" / "wiki.test.tokens"]
        done = run_cli("preprocess", [*words, "--destdir", folder])
        assert done.status == 0, done.stderr
        assert (folder / "dict.txt").read_bytes() == given.read_bytes()
        assert Dictionary.load(folder / "dict.txt") == Dictionary.load(given)
        assert ("lines repeat a symbol" in done.stdout) == (content == "a 3\na 1\n")
        assert ("begins with a byte order mark" in done.stdout) == content.startswith("\ufeff")


@pytest.mark.parametrize("content", ["", "a\n", "a 1_000\n", "a \uff15\n", "a 1.5\n", "a 1 #fairseq:other\n", "{}"])
def test_a_dictionary_that_is_none_is_refused(run_cli, text, content):
    (text / "dict").write_text(content, encoding="utf-8")
    words = ["--only-source", "--srcdict", text / "dict", "--testpref", text / "text", "--destdir", text / "bin"]
    assert f"{text / 'dict'}: found" in run_cli("preprocess", words).error


def test_a_dictionary_of_another_text_is_said(run_cli, text):
    (text / "dict").write_text("nothing 5\n")
    words = ["--only-source", "--srcdict", text / "dict", "--testpref", text / "text", "--destdir", text / "bin"]
    assert "more than half of the words are unknown" in run_cli("preprocess", words).stdout
