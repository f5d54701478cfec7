"""The recipes of docs/extending.md, run as they are written: through the command line, as plug-ins."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "fixtures" / "golden"
CODE = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def plug_in(tmp_path: Path) -> Any:
    """plug_in(word): the folder of a package with the recipe that has this word in its code."""

    def plug_in(word: str) -> Path:
        (code,) = [code for code in CODE if word in code]
        assert len(code.splitlines()) <= 48
        package = tmp_path / "user" / "my_ideas"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(code)
        return package

    return plug_in


def run(command: list[str], cwd: Path) -> None:
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def evaluate(tmp_path: Path, *flags: str, index: str = "--indexfile checkpoints/knn16.index") -> dict[str, float]:
    words = (
        "data-bin --path checkpoints/checkpoint_best.pt --sample-break-mode complete --max-tokens 128 "
        "--context-window 96 --batch-size 2 --gen-subset valid --no-progress-bar "
        f"--dstore-filename checkpoints/dstore16 {index} --knnlm --dstore-fp16 "
        "--k 256 --probe 8 --lmbda 0.25 "
        "--knn-sim-func do_not_recomp_l2 --no-load-keys"
    ).split()
    results = tmp_path / "results.json"
    run([str(ROOT / "eval_lm.py"), *words, *flags, "--results-json", str(results)], GOLDEN)
    return json.loads(results.read_text())


def test_the_documented_strategy_runs_as_a_plug_in(plug_in: Any, tmp_path: Path) -> None:
    folder = str(plug_in("PeriodicRetriever"))
    every_fourth = evaluate(tmp_path, "--user-dir", folder, "--strategy", "periodic", "--search-every", "4")
    # at least every fourth token is searched, so at most three quarters of the searches are saved
    assert 0 < every_fourth["searches_saved_percent"] <= 75
    always = evaluate(
        tmp_path, "--user-dir", folder, "--strategy", "periodic", "--search-every", "1", "--min-knns", "9999999"
    )
    assert always["searches_saved_percent"] == 0
    plain = evaluate(tmp_path, "--min-knns", "9999999")
    assert always["loss_base2"] == pytest.approx(plain["loss_base2"], abs=1e-9)  # no token is idle, so nothing decays


def test_the_documented_strategy_writes(plug_in: Any, tmp_path: Path) -> None:
    """Its state goes with hypotheses: prompts of unequal length together give what each gives alone, and every
    hypothesis of a beam was searched at least at every third token."""
    (tmp_path / "p").write_text("the new brola was\nIn\nIt is not known who sold the\n")
    words = (
        "-m fairseq_cli.interactive data-bin --path checkpoints/checkpoint_best.pt --cpu --knnlm --dstore-fp16 "
        "--dstore-filename checkpoints/dstore16 --indexfile checkpoints/knn16.index --k 64 --lmbda 0.3 --no-load-keys "
        f"--knn-sim-func do_not_recomp_l2 --max-len-b 9 --json --input {tmp_path / 'p'} "
        f"--user-dir {plug_in('PeriodicRetriever')} --strategy periodic --search-every 3"
    ).split()

    def written(*flags: str) -> list[Any]:
        done = subprocess.run([sys.executable, *words, *flags], cwd=GOLDEN, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    alone, together, beams = written(), written("--batch-size", "3"), written("--beam", "3", "--nbest", "3")
    assert [found["text"] for found in alone] == [found["text"] for found in together]
    assert len(beams) == 9
    for found in (*together, *beams):
        searched = [token["searched"] for token in found["tokens"]]
        assert all(any(searched[i : i + 3]) for i in range(len(searched) - 2)) and not all(searched)
        for token, idle in zip(found["tokens"], since_search(searched)):
            if idle is not None:
                assert token["lmbda"] == pytest.approx(0.3 * 0.95**idle)


def since_search(searched: list[bool]) -> list[int | None]:
    """Tokens since the last search, None where it was in the prompt."""
    idle: list[int | None] = []
    for now in searched:
        idle.append(0 if now else None if not idle or idle[-1] is None else idle[-1] + 1)
    return idle


def test_the_documented_weight_runs_as_a_plug_in(plug_in: Any, tmp_path: Path) -> None:
    flags = ("--user-dir", str(plug_in("ConfidentRetriever")), "--strategy", "confident", "--confidence")
    plain, constant, varying = evaluate(tmp_path), evaluate(tmp_path, *flags, "0"), evaluate(tmp_path, *flags, "1")
    assert constant["loss_base2"] == pytest.approx(plain["loss_base2"], abs=1e-6)
    assert varying["loss_base2"] != pytest.approx(plain["loss_base2"], abs=1e-3)
    assert varying["searches_saved_percent"] == plain["searches_saved_percent"]


def test_the_documented_index_runs_as_a_plug_in(plug_in: Any, tmp_path: Path) -> None:
    folder = str(plug_in("PartsIndex"))
    size = (GOLDEN / "checkpoints" / "dstore16_vals.npy").stat().st_size // 8
    keys = np.fromfile(GOLDEN / "checkpoints" / "dstore16_keys.npy", np.float16).reshape(size, -1).astype(np.float32)
    for name, part in {"all": keys, "first": keys[: size // 3], "second": keys[size // 3 :]}.items():
        index = faiss.IndexFlatL2(keys.shape[1])
        index.add(part)
        faiss.write_index(index, str(tmp_path / f"{name}.index"))
    whole = evaluate(tmp_path, index=f"--indexfile {tmp_path}/all.index")
    both = f"{tmp_path}/first.index:{tmp_path}/second.index"
    parts = evaluate(tmp_path, index=f"--user-dir {folder} --index parts --indexfile {both}")
    assert parts["loss_base2"] == pytest.approx(whole["loss_base2"], abs=1e-6)
    assert parts["searches_saved_percent"] == whole["searches_saved_percent"]
    evaluate(tmp_path, index=f"--user-dir {folder} --index parts --indexfile {both} --part-probe 1")
    for command, named in (("sweep", "--output o"), ("adaptret", "--save g")):
        words = f"--scores s {named} --dstore-filename d --user-dir {folder} --index parts --part-probe 0"
        done = subprocess.run(
            [sys.executable, "-m", f"fairseq_cli.{command}", *words.split()], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 2 and "--part-probe: found '0', expected an integer of at least 1" in done.stderr


def test_the_documented_type_of_key_runs_as_a_plug_in(plug_in: Any, tmp_path: Path) -> None:
    folder, store = str(plug_in("TwoLayers")), tmp_path / "two"
    common = "data-bin --path checkpoints/checkpoint_best.pt --no-progress-bar --gen-subset"
    flags = ["--user-dir", folder, "--knn-keytype", "two_layers"]
    save = ["valid", "--save-knnlm-dstore", "--dstore-mmap", str(store), *flags]
    run([str(ROOT / "eval_lm.py"), *common.split(), *save], GOLDEN)
    described = json.loads((tmp_path / "two.json").read_text())
    keys = np.fromfile(f"{store}_keys.npy", np.float32).reshape(described["rows"], -1)
    assert described["dimension"] == keys.shape[1] == 64 and described["key_type"] == "two_layers"
    np.testing.assert_allclose(np.linalg.norm(keys.reshape(-1, 2, 32), axis=2), 1, atol=1e-5)
    results = tmp_path / "results.json"
    run([str(ROOT / "eval_lm.py"), *common.split(), "valid", "--results-json", str(results)], GOLDEN)
    plain = json.loads(results.read_text())["perplexity"]
    use = ["valid", "--knnlm", "--dstore-filename", str(store), *"--index exact --k 4 --lmbda 0.5".split(), *flags]
    run([str(ROOT / "eval_lm.py"), *common.split(), *use, "--no-pointer", "--results-json", str(results)], GOLDEN)
    assert json.loads(results.read_text())["perplexity"] < 0.6 * plain  # the text is its own datastore
    refused = [str(ROOT / "eval_lm.py"), *common.split(), *use, "--knn-keytype", "final_hidden"]
    done = subprocess.run([sys.executable, *refused], cwd=GOLDEN, capture_output=True, text=True)
    assert done.returncode == 2 and "key type two_layers" in done.stderr, done.stderr


def test_the_documented_language_model_stands_before_retrieval(tmp_path: Path) -> None:
    (code,) = [code for code in CODE if "class OwnModel" in code]
    (tmp_path / "own_model.py").write_text(code)
    run(["own_model.py", "own"], tmp_path)
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^    fairseq-sweep (--scores own.*)$", text, re.MULTILINE)
    run(["-m", "fairseq_cli.sweep", *command.split(), "--no-progress-bar"], tmp_path)
    points = json.loads((tmp_path / "own" / "sweep.json").read_text())["points"]
    assert len(points) == 2
    assert all(point["perplexity"] < 50 for point in points)  # of the model alone: 50 words, all equally likely


def test_an_unknown_strategy_is_refused() -> None:
    command = [sys.executable, str(ROOT / "eval_lm.py"), "data-bin", "--path", "x", "--strategy", "periodic"]
    run = subprocess.run(command, cwd=GOLDEN, capture_output=True, text=True)
    assert run.returncode == 2
    assert "periodic" in run.stderr and "Traceback" not in run.stderr


def test_an_unknown_index_is_refused() -> None:
    files = "--path checkpoints/checkpoint_best.pt --dstore-filename checkpoints/dstore16"
    words = f"data-bin {files} --knnlm --index parts"
    command = [sys.executable, str(ROOT / "eval_lm.py"), *words.split()]
    run = subprocess.run(command, cwd=GOLDEN, capture_output=True, text=True)
    assert run.returncode == 2
    assert "--index: found parts, expected one of exact" in run.stderr and "Traceback" not in run.stderr


WRONG_INDEX = """
import torch
from fairseq.retrieval.index import register_index

@register_index("wrong")
class WrongIndex:
    needs_keys, takes_file, exact, inner_product = False, False, False, False
    device = torch.device("cpu")

    def __init__(self, size, dimension):
        self.size = self.count = size
        self.dimension = dimension

    @classmethod
    def open(cls, args, datastore, device):
        return cls(datastore.size, 32)

    def search(self, queries, k):
        return torch.zeros(len(queries), k), torch.full((len(queries), k), WHAT)

    def distances(self, queries, rows, ids):
        return torch.zeros(len(ids))

    def describe(self):
        return "wrong"
"""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("WHAT", "1 << 40"), "WrongIndex.search: found entries from"),
        (("(len(queries), k), WHAT", "(len(queries), 3), 0"), "WrongIndex.search: found distances of shape"),
        (("def describe", "def describes"), "--index wrong: found WrongIndex without describe"),
        (("self.size = self.count = size", "self.count = size"), "--index wrong: found WrongIndex without size"),
    ],
)
def test_mistakes_of_an_index_are_named(change: tuple[str, str], said: str, tmp_path: Path) -> None:
    package = tmp_path / f"ideas_{len(said)}_{len(change[1])}"
    package.mkdir()
    (package / "__init__.py").write_text(WRONG_INDEX.replace(*change).replace("WHAT", "0"))
    words = "data-bin --path checkpoints/checkpoint_best.pt --gen-subset valid --context-window 96 --max-tokens 128"
    store = "--knnlm --dstore-filename checkpoints/dstore16 --dstore-fp16 --k 8 --knn-sim-func do_not_recomp_l2"
    flags = ["--user-dir", str(package), "--index", "wrong", "--no-progress-bar"]
    command = [sys.executable, str(ROOT / "eval_lm.py"), *words.split(), *store.split(), *flags]
    done = subprocess.run(command, cwd=GOLDEN, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_saved_searches_of_an_index_are_checked_too(tmp_path: Path) -> None:
    package = tmp_path / "ideas_saved"
    package.mkdir()
    (package / "__init__.py").write_text(WRONG_INDEX.replace("WHAT", "1 << 40"))
    store = "--knnlm --dstore-filename checkpoints/dstore16 --dstore-fp16 --k 8 --knn-sim-func do_not_recomp_l2"
    words = "data-bin --path checkpoints/checkpoint_best.pt --gen-subset valid --context-window 96 --max-tokens 128"
    flags = ["--user-dir", str(package), "--index", "wrong", "--save-scores", str(tmp_path / "s"), "--save-searches"]
    command = [sys.executable, str(ROOT / "eval_lm.py"), *words.split(), *store.split(), *flags]
    done = subprocess.run(command, cwd=GOLDEN, capture_output=True, text=True)
    assert done.returncode == 2 and "WrongIndex.search: found entries from" in done.stderr, done.stderr


def test_python_reads_a_user_dir(plug_in: Any) -> None:
    code = (
        "from fairseq.retrieval_lm import RetrievalLM;"
        f"lm = RetrievalLM.open('checkpoints/checkpoint_best.pt', 'data-bin', dstore_filename='checkpoints/dstore16', "
        f"indexfile='checkpoints/knn16.index', dstore_fp16=True, k=16, lmbda=0.2, strategy='periodic', "
        f"user_dir={str(plug_in('PeriodicRetriever'))!r}); print(lm.score_text('the').perplexity > 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=GOLDEN, capture_output=True, text=True)
    assert done.stdout.strip().endswith("True"), done.stderr
