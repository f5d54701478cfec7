"""Every command line of the original RetoMaton README and of the Law-MT fine-tuning recipe, kept as typed in
`original/`: parsed with its real figures, and run in a form that differs only by SMALL_WIKI or SMALL_LAW. A shell
splits the words, so variables, quotes, continued lines and loops are the user's own.

WikiText-103 stands on the golden bundle, whose original results must come out. Law-MT stands on a little text of BPE
pieces and a model of the WMT19 kind (embeddings narrower than layers), scored line by line."""

from __future__ import annotations

import functools
import json
import pickle
import random
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from fairseq import options
from fairseq_cli import build_dstore, kmeans

ORIGINAL = Path(__file__).parent / "original"
GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())

# What is typed, and what the test types instead: sizes, the golden dictionary, and --fp16, which needs a GPU.
SMALL_WIKI = {
    "--only-source": "--only-source --nwordssrc 1500",
    "--workers 20": "--workers 2",
    "--arch transformer_lm_wiki103": "--arch transformer_lm_wiki103 --decoder-embed-dim 32 --decoder-input-dim 32 "
    "--decoder-output-dim 32 --decoder-ffn-embed-dim 64 --decoder-layers 2 --decoder-attention-heads 2 "
    "--adaptive-input-cutoff 300,900 --adaptive-softmax-cutoff 300,900",
    "--max-update 286000": "--max-update 4",
    "--lr-period-updates 270000": "--lr-period-updates 3",
    "--warmup-updates 16000": "--warmup-updates 1",
    "--max-tokens 3072": "--max-tokens 128",
    "--tokens-per-sample 3072": "--tokens-per-sample 128",
    "--tokens-per-sample 1536": "--tokens-per-sample 64",
    "--context-window 1536": "--context-window 64",
    "--context-window 2560": "--context-window 96",
    "size 103225485": "size 16938",
    "--k 1024": "--k 256",
    "--max-knns 1024": "--max-knns 256",
    "--min-knns 100 ": "--min-knns 20 ",
    "--probe 32": "--probe 8",
    "--dim 1024": "--dim 32",
    "--num-clusters 1000000": "--num-clusters 400",
    "_k1000000_": "_k400_",
    "--starting_point 0": "--starting_point 0 --ncentroids 64 --code_size 8",
}
SMALL_LAW = {
    "--workers 20": "--workers 2",
    "--fp16": "",
    "--decoder-embed-dim 1536 --decoder-input-dim 1024 --decoder-output-dim 1024": "--decoder-embed-dim 32 "
    "--decoder-input-dim 16 --decoder-output-dim 16",
    "--decoder-layers 20 --decoder-ffn-embed-dim 6144": "--decoder-layers 2 --decoder-ffn-embed-dim 64",
    "--max-update 30000": "--max-update 12",
    "--lr-period-updates 27000": "--lr-period-updates 8",
    "--warmup-updates 4000": "--warmup-updates 4",
    "--max-tokens 1024": "--max-tokens 128",
    "--max-tokens 2048": "--max-tokens 64",
    "--tokens-per-sample 512": "--tokens-per-sample 24",
    "size 19068709": "size 2545",
    "--k 1024": "--k 64",
    "--max-knns 1024": "--max-knns 64",
    "--probe 32": "--probe 4",
    "--dim 1536": "--dim 32",
    "--num-clusters 200000": "--num-clusters 40",
    "_k200000_": "_k40_",
    "--starting_point 0": "--starting_point 0 --ncentroids 16 --code_size 8",
}
LAW_ROWS = 2545  # all training tokens; 19,068,709 of the real text
LAW_TOO_LONG = 32  # tokens of the one training line that the model cannot hold; 19,847 of the real text

# Golden settings under their README names.
GOLDEN_SETTING = {
    "wiki-lm": "a_base",
    "wiki-knnlm": "b_knnlm",
    "wiki-no-clusters": "c_retomaton_noclusters",
    "wiki-retomaton": "d_retomaton_members",
    "wiki-retomaton-always": "e_members_minknns9999999",
    "wiki-retomaton-100": "f_members_minknns20",
}
PROGRAMS = {
    "preprocess.py": options.get_preprocessing_parser,
    "train.py": options.get_training_parser,
    "eval_lm.py": options.get_eval_lm_parser,
    "build_dstore.py": build_dstore.get_parser,
    "kmeans.py": kmeans.get_parser,
}


def read_commands(name: str) -> dict[str, str]:
    """Name -> shell text of one file, in order."""
    parts = re.split(r"^# == (\S+)\n", (ORIGINAL / name).read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


WIKI, LAW = read_commands("wikitext-103.sh"), read_commands("law-mt.sh")


@functools.cache
def words_of(script: str) -> list[list[str]]:
    """The command lines that a shell makes of `script`, each a list of words, without the word `python`."""
    tell = "python() { printf '%s\\0' \"$@\"; printf '\\n\\0'; }\n"
    shell = subprocess.run(["bash", "-euc", tell + script], capture_output=True, text=True, check=True)
    return [line.removesuffix("\0").split("\0") for line in shell.stdout.split("\n\0") if line]


def smaller(script: str, table: dict[str, str]) -> str:
    for typed, small in table.items():
        script = script.replace(typed, small)
    return script


# ---------------------------------------------------------------------------------------------------------------------
# As typed: parsing


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Namespace:
    program, *arguments = words
    monkeypatch.setattr(sys, "argv", words)
    parser = PROGRAMS[program]()
    if program in ("train.py", "eval_lm.py"):
        return options.parse_args_and_arch(parser, arguments)
    return parser.parse_args(arguments)


@pytest.mark.parametrize("name", [*WIKI, *LAW])
def test_parsed_as_typed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = {**WIKI, **LAW}[name]
    commands = words_of(script)
    assert len(commands) == (9 if name == "law-lambdas" else 1)
    for words in commands:
        args = vars(parse(words, monkeypatch))
        typed = {key.lstrip("-"): value for key, value in zip(words, [*words[1:], ""]) if key.startswith("--")}
        for key, value in typed.items():
            key, _, joined = key.partition("=")
            key = {"batch-size": "max_sentences"}.get(key, key.replace("-", "_"))
            assert key in args, key
            value = joined or value
            if re.fullmatch(r"\d+", value):
                assert args[key] == int(value) or args[key] == [int(value)] or float(args[key]) == float(value)


def test_the_tables_say_nothing_that_is_not_typed() -> None:
    for scripts, table in ((WIKI, SMALL_WIKI), (LAW, SMALL_LAW)):
        unused = [typed for typed in table if not any(typed in script for script in scripts.values())]
        assert unused == []


def test_figures_that_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    train = parse(*words_of(WIKI["wiki-train"]), monkeypatch)
    assert (train.decoder_layers, train.decoder_embed_dim, train.adaptive_input_cutoff) == (16, 1024, "20000,60000")
    assert (train.lr, train.max_lr, train.min_lr, train.ddp_backend) == ([1e-4], 1.0, 1e-9, "no_c10d")
    law = parse(*words_of(LAW["law-retomaton"]), monkeypatch)
    assert law.remove_bpe == "@@ " and law.sample_break_mode == "eos" and law.lmbda == 0.9
    assert law.members == "checkpoints/law/law_clusters_s40000000_k200000_members.pkl"
    finetuned = parse(*words_of(LAW["finetuned-retomaton"]), monkeypatch)
    assert finetuned.members is None and finetuned.lmbda == 0.25
    assert parse(*words_of(WIKI["wiki-kmeans"]), monkeypatch).save is None


def test_the_readme_of_the_examples_types_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "examples" / "language_model" / "README.md").read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    blocks = [block for block in blocks if "python" in block]
    assert len(blocks) == 6
    scripts = [script for script in {**WIKI, **LAW}.values() if "LMBDA" not in script]
    theirs = [vars(parse(*words_of(script), monkeypatch)) for script in scripts]
    for block in blocks:
        ours = vars(parse(*words_of(block), monkeypatch))
        if ours.get("path") == "checkpoints/checkpoint_best.pt":  # your own model, and the text that papers report
            ours |= {"path": "checkpoints/wt103/wt103_checkpoint_best.pt", "gen_subset": "valid", "max_sentences": 2}
        assert ours in theirs, block


# ---------------------------------------------------------------------------------------------------------------------
# WikiText-103, small


class Workshop:
    """A folder in which the commands run: every result is kept under the command's name."""

    def __init__(self, folder: Path, run_cli: Any, scripts: dict[str, str], table: dict[str, str]) -> None:
        self.folder, self.run_cli, self.scripts, self.table = folder, run_cli, scripts, table
        self.done: dict[str, list[Any]] = {}

    def run(self, name: str, *more: str) -> str:
        """Runs a command (every round of its loop); returns what it printed."""
        self.done[name] = []
        for words in words_of(smaller(self.scripts[name], self.table)):
            program, *arguments = words
            done = self.run_cli(program.removesuffix(".py"), [*arguments, *more], cwd=self.folder)
            assert done.status == 0, f"{name}\n{done.stdout}\n{done.stderr}"
            self.done[name].append(done)
        return self.printed(name)

    def printed(self, name: str) -> str:
        return "".join(done.stdout + done.stderr for done in self.done[name])

    def losses(self, name: str) -> list[float]:
        return [float(loss) for loss in re.findall(r"Loss \(base 2\): (\S+), Perplexity", self.printed(name))]


def link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(source)


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory: pytest.TempPathFactory, run_cli: Any) -> Workshop:
    """The released artefacts, without sidecars, under the README's names."""
    folder = tmp_path_factory.mktemp("downloaded")
    link(GOLDEN / "data-bin", folder / "data-bin" / "wikitext-103")
    names = {
        "checkpoint_best.pt": "wt103_checkpoint_best.pt",
        "kmeans_s40000000_k400_members.pkl": "clusters_s40000000_k400_members.pkl",
        **{name: name for name in ("dstore16_keys.npy", "dstore16_vals.npy", "knn16.index")},
    }
    for theirs, ours in names.items():
        link(GOLDEN / "checkpoints" / theirs, folder / "checkpoints" / "wt103" / ours)
    return Workshop(folder, run_cli, WIKI, SMALL_WIKI)


@pytest.mark.parametrize("name", GOLDEN_SETTING)
def test_wiki_on_downloaded_artefacts(name: str, downloaded: Workshop) -> None:
    printed = downloaded.run(name)
    expected = EXPECTED[GOLDEN_SETTING[name]]
    assert downloaded.losses(name) == [pytest.approx(expected["loss_base2"], abs=1.01e-4)]
    saved = re.findall(r"Lookups saved: (\S+)%", printed)
    if name == "wiki-lm":
        assert saved == []
    else:
        assert float(saved[0]) == pytest.approx(expected["lookups_saved_pct_logged"], abs=1e-6)


def test_index_and_clusters_of_a_downloaded_datastore(
    downloaded: Workshop, tmp_path: Path, run_cli: Any
) -> None:
    """As documented: neither --dstore_fp16 nor --dimension, and no sidecar."""
    for name in ("dstore16_keys.npy", "dstore16_vals.npy"):
        link(GOLDEN / "checkpoints" / name, tmp_path / "checkpoints" / "wt103" / name)
    shop = Workshop(tmp_path, run_cli, WIKI, SMALL_WIKI)
    assert "keys of dimension 32 in float16" in shop.run("wiki-build")
    index = faiss.read_index(str(tmp_path / "checkpoints" / "wt103" / "knn16.index"))
    assert (index.d, index.ntotal) == (32, 16938)
    shop.run("wiki-kmeans")
    with open(tmp_path / "checkpoints" / "wt103" / "kmeans_s40000000_k400_members.pkl", "rb") as stream:
        members = pickle.load(stream)
    assert members.shape == (400, 16938) and members.nnz == 16938


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, run_cli: Any) -> Workshop:
    """From the text on, with the released language model."""
    folder = tmp_path_factory.mktemp("made")
    link(GOLDEN / "text", folder / "examples" / "language_model" / "wikitext-103")
    link(GOLDEN / "checkpoints" / "checkpoint_best.pt", folder / "checkpoints" / "wt103" / "wt103_checkpoint_best.pt")
    shop = Workshop(folder, run_cli, WIKI, SMALL_WIKI)
    for name in ("preprocess", "train", "save", "build", "kmeans", "kmeans-save", "no-clusters", "retomaton"):
        shop.run(f"wiki-{name}")
    return shop


def test_wiki_from_the_text_on(made: Workshop) -> None:
    for name in ("dict.txt", "train.bin", "train.idx", "valid.bin", "valid.idx", "test.bin", "test.idx"):
        ours = made.folder / "data-bin" / "wikitext-103" / name
        assert ours.read_bytes() == (GOLDEN / "data-bin" / name).read_bytes()
    assert "num_updates 4" in made.printed("wiki-train")
    assert (made.folder / "checkpoints" / "checkpoint_best.pt").exists()
    folder = made.folder / "checkpoints" / "wt103"
    assert (folder / "dstore16_vals.npy").read_bytes() == (GOLDEN / "checkpoints" / "dstore16_vals.npy").read_bytes()
    assert "ignored" not in made.printed("wiki-save")  # 1536 of 3072 with a window of 1536 is what one gets anyway
    for name in ("kmeans_s40000000_k400", "clusters_s40000000_k400"):
        assert (folder / f"{name}_members.pkl").exists()
    for name in ("wiki-no-clusters", "wiki-retomaton"):  # another index and other clusters, the same method
        assert made.losses(name) == [pytest.approx(EXPECTED[GOLDEN_SETTING[name]]["loss_base2"], abs=0.05)]


# ---------------------------------------------------------------------------------------------------------------------
# Law-MT, small


def law_text() -> dict[str, list[str]]:
    """Sentences of BPE pieces from a few patterns, as formulaic as law; the same on every run."""
    draw = random.Random(7).choice
    bodies = ["Com@@ mission", "Council", "Parli@@ am@@ ent", "Member States", "author@@ ities"]
    acts = ["reg@@ ul@@ ation", "dir@@ ective", "decision", "opin@@ ion", "ann@@ ex"]
    verbs = ["shall adop@@ t", "may am@@ end", "shall publ@@ ish", "rep@@ eals"]
    ends = ["within three months .", "without delay .", "in accor@@ dance with Art@@ icle 4 .", "."]

    def sentence() -> str:
        return f"The {draw(bodies)} {draw(verbs)} the {draw(acts)} on {draw(acts)} {draw(ends)}"

    texts = {split: [sentence() for _ in range(size)] for split, size in (("train", 150), ("valid", 20), ("test", 30))}
    texts["train"].insert(70, " ".join(["Art@@ icle 4 ;"] * 7) + " and so forth")
    return texts


@pytest.fixture(scope="module")
def law(tmp_path_factory: pytest.TempPathFactory, run_cli: Any) -> Workshop:
    """All Law-MT commands, in order, after training a small model in place of WMT19's."""
    folder = tmp_path_factory.mktemp("law")
    texts = law_text()
    (folder / "law").mkdir()
    for split, lines in texts.items():
        (folder / "law" / f"{split}.txt").write_text("".join(line + "\n" for line in lines))
    (folder / "wmt19.en").mkdir()
    pieces = sorted({piece for line in texts["train"] for piece in line.split()})
    (folder / "wmt19.en" / "dict.txt").write_text("".join(f"{piece} 1\n" for piece in [*pieces, "news@@", "today"]))
    shop = Workshop(folder, run_cli, LAW, SMALL_LAW)
    shop.run("law-preprocess")
    base = smaller(LAW["law-finetune"], SMALL_LAW).replace("--restore-file wmt19.en/model.pt", "")
    base = base.replace("--save-dir checkpoints/law-finetune", "--save-dir wmt19.en --no-epoch-checkpoints")
    (words,) = words_of(base)
    done = run_cli("train", words[1:], cwd=folder)
    assert done.status == 0, done.stdout + done.stderr
    (folder / "wmt19.en" / "checkpoint_last.pt").rename(folder / "wmt19.en" / "model.pt")
    for name in list(LAW)[1:]:
        shop.run(name)
        if name == "law-finetune":
            best = folder / "checkpoints" / "law-finetune" / "checkpoint_best.pt"
            shutil.copyfile(best, folder / "checkpoints" / "law" / "finetuned.pt")
    return shop


def test_law_counts_words(law: Workshop) -> None:
    """Perplexity is per word: pieces joined, one end of line a sentence."""
    lines = law_text()["test"]
    words = sum(len(line.replace("@@ ", "").split()) + 1 for line in lines)
    tokens = sum(len(line.split()) + 1 for line in lines)
    for name in (name for name in LAW if name.endswith(("-lm", "-knnlm", "-retomaton"))):
        assert f"Evaluated {tokens} tokens" in law.printed(name)
    results = law.folder / "results.json"
    law.run("law-lm", "--results-json", str(results))
    figures = json.loads(results.read_text())
    found = {**figures, **figures.get("results", {})}
    assert found["count"] == words and found["unit"] == "word"


def test_law_datastore_leaves_out_what_the_model_cannot_hold(law: Workshop) -> None:
    assert sum(len(line.split()) + 1 for line in law_text()["train"]) == LAW_ROWS
    filled = LAW_ROWS - LAW_TOO_LONG
    for name, prefix in (("law", "dstore16"), ("finetuned", "dstore16_finetuned_size19068709_embed1536_fp16")):
        saved = law.printed(f"{name}-save")
        assert "1 samples have invalid sizes and will be skipped" in saved
        assert "the rest stays zero" in saved
        keys = np.fromfile(law.folder / "checkpoints" / "law" / f"{prefix}_keys.npy", np.float16).reshape(LAW_ROWS, 32)
        assert (keys[:filled] != 0).any(axis=1).all() and not keys[filled:].any()
        values = np.fromfile(law.folder / "checkpoints" / "law" / f"{prefix}_vals.npy", np.int64)
        assert (values[:filled] == 2).sum() == 150  # one end of line a sentence, shortest sentences first
        ends = np.flatnonzero(values[:filled] == 2)
        assert (np.diff(np.diff(ends, prepend=-1)) >= 0).all()
        assert f"the last {LAW_TOO_LONG} rows are all zero" in law.printed(f"{name}-build")
    index = faiss.read_index(str(law.folder / "checkpoints" / "law" / "knn.19048862.index"))
    assert (index.d, index.ntotal) == (32, filled)


def test_law_results(law: Workshop) -> None:
    (lm,), (knnlm,), (always,) = (law.losses(f"law-{name}") for name in ("lm", "knnlm", "retomaton-always"))
    assert knnlm < lm and always < lm  # a model that saw little; its datastore knows the text
    retrieving = ("law-knnlm", "law-no-clusters", "law-retomaton", "law-retomaton-always", "finetuned-retomaton")
    saved = {name: float(re.findall(r"truly saved: (\S+)%", law.printed(name))[0]) for name in retrieving}
    assert saved["law-knnlm"] == saved["law-retomaton-always"] == 0
    assert saved["law-retomaton"] >= saved["law-no-clusters"] > 0
    losses = law.losses("law-lambdas")
    assert len(set(losses)) == 9 and losses[8] == law.losses("law-retomaton")[0]
    (finetuned,), (with_knn,) = law.losses("finetuned-lm"), law.losses("finetuned-knnlm")
    assert finetuned < lm and with_knn < finetuned
    assert saved["finetuned-retomaton"] > 0
    assert "loaded checkpoint wmt19.en/model.pt" in law.printed("law-finetune")
