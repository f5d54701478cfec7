"""A sweep's points are what eval_lm finds, and need no second evaluation pass: against the golden bundle, whose
settings eval_lm is checked with elsewhere."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairseq.evaluation import sweep as sweep_module
from fairseq.retrieval.index import FaissIndex
from fairseq_cli.sweep import method_name

GOLDEN = Path(__file__).resolve().parents[1] / "fixtures" / "golden"
MEMBERS = "checkpoints/kmeans_s40000000_k400_members.pkl"
LM = (
    "data-bin --path checkpoints/checkpoint_best.pt --sample-break-mode complete --max-tokens 128 --batch-size 2 "
    "--context-window 96 --gen-subset valid --no-progress-bar"
).split()
STORES = "--dstore-filename checkpoints/dstore16 --indexfile checkpoints/knn16.index --probe 8".split()
FROM_CODES = "--knn-sim-func do_not_recomp_l2 --no-load-keys".split()
# As a sweep's grid finds them, and what to give eval_lm for the same.
SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"strategy": "knnlm", "lmbda": 0.25, "knn_temp": 1, "k": 256}, "--no-pointer"),
    ({"strategy": "knnlm", "lmbda": 0.5, "knn_temp": 3, "k": 100}, "--no-pointer"),
    ({"strategy": "random_skip", "skip_probability": 0.3, "lmbda": 0.5, "knn_temp": 3, "k": 256}, ""),
    ({"strategy": "retomaton", "members": MEMBERS, "min_knns": 1, "lmbda": 0.5, "knn_temp": 1, "k": 256}, ""),
    ({"strategy": "retomaton", "members": MEMBERS, "min_knns": 20, "lmbda": 0.25, "knn_temp": 3, "k": 256}, ""),
    ({"strategy": "retomaton", "members": MEMBERS, "min_knns": 20, "lmbda": 0.5, "knn_temp": 3, "k": 100}, ""),
    ({"strategy": "retomaton", "members": None, "min_knns": 20, "lmbda": 0.5, "knn_temp": 1, "k": 256}, ""),
]


@pytest.fixture(scope="module")
def scores(run_cli: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores and searches, saved by an evaluation."""
    folder = tmp_path_factory.mktemp("scores") / "valid"
    flags = [*LM, *STORES, *FROM_CODES, "--knnlm", "--k", "256", "--lmbda", "0.25", "--members", MEMBERS]
    done = run_cli("eval_lm", [*flags, "--save-scores", folder, "--save-searches"], cwd=GOLDEN)
    assert done.status == 0, done.stderr
    assert len(list(folder.glob("searches-*/searches.json"))) == 1
    return folder


@pytest.fixture
def sweep(run_cli: Any, scores: Path, tmp_path: Path) -> Any:
    """sweep(flags): the results of a sweep with its output in tmp_path."""

    def sweep(flags: str, status: int = 0, similarity: list[str] = FROM_CODES) -> Any:
        words = ["--scores", scores, "--output", tmp_path / "out", *STORES, *similarity, *shlex.split(flags)]
        done = run_cli("sweep", [*words, "--no-progress-bar"], cwd=GOLDEN)
        assert done.status == status, done.stderr
        return done if status else json.loads((tmp_path / "out.json").read_text())

    return sweep


def point(results: dict[str, Any], **wanted: Any) -> dict[str, Any]:
    (found,) = (p for p in results["points"] if wanted.items() <= p.items())
    return found


def test_points_are_what_eval_lm_finds(
    sweep: Any, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(FaissIndex, "search", None)  # the searches are known
        results = sweep(
            f"--strategy knnlm 'random_skip --skip-probability 0.3 0.6' retomaton --members {MEMBERS} none "
            "--min-knns 1 20 --k 256 100 --lmbda 0.25 0.5 --knn-temp 1 3"
        )
    assert len(results["points"]) == 4 * (2 + 4 + 8)
    for settings, extra in SETTINGS:
        found = point(results, **settings)
        names = {"strategy": "--strategy", "skip_probability": "--skip-probability", "k": "--k", "lmbda": "--lmbda"}
        names |= {"knn_temp": "--knn-temp", "min_knns": "--min-knns", "members": "--members"}
        flags = [w for name, value in settings.items() if value is not None for w in (names[name], str(value))]
        words = [*LM, *STORES, *FROM_CODES, "--knnlm", *flags, *extra.split(), "--results-json", tmp_path / "r.json"]
        assert run_cli("eval_lm", words, cwd=GOLDEN).status == 0
        expected = json.loads((tmp_path / "r.json").read_text())
        for name in ("loss_base2", "searches_saved_percent", "lookups_saved_percent_printed", "count"):
            assert found[name] == pytest.approx(expected[name], abs=1e-6), (settings, name)


def test_recomputed_distances(sweep: Any) -> None:
    """Of the golden settings l and n: exact L2, and inner products, from the keys."""
    expected = json.loads((GOLDEN / "expected.json").read_text())
    flags = f"--strategy retomaton --members {MEMBERS} --k 256 --lmbda 0.25"
    (found,) = sweep(flags, similarity=[])["points"]
    assert found["loss_base2"] == pytest.approx(expected["l_members_recompute_l2"]["loss_base2"], abs=5e-5)
    done = sweep(flags, 2, ["--knn-sim-func", "dot"])
    assert "choose another --output" in done.error


def test_lm_alone_and_tables(sweep: Any, tmp_path: Path) -> None:
    results = sweep("--strategy retomaton --k 256 --min-knns 5")
    expected = json.loads((GOLDEN / "expected.json").read_text())["a_base"]
    assert results["lm"]["loss_base2"] == pytest.approx(expected["loss_base2"], abs=5e-5)
    assert results["lm"]["count"] == expected["count"]
    (row,) = csv.DictReader((tmp_path / "out.csv").open())
    assert float(row["perplexity"]) == results["points"][0]["perplexity"]
    assert (row["strategy"], row["min_knns"], row["members"]) == ("retomaton", "5", "")
    last = (tmp_path / "out.md").read_text().splitlines()[-1]
    assert last.startswith("| retomaton | - | 5 | 256 | 0.25 | 1 |")


def test_a_killed_sweep_goes_on(sweep: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flags = "--strategy retomaton --k 256 --min-knns 30 6 2"
    evaluate, passes = sweep_module.Sweep._evaluate, []

    def killed(self: Any, *arguments: Any) -> Any:
        if len(passes) == 2:
            raise KeyboardInterrupt
        passes.append(arguments)
        return evaluate(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sweep_module.Sweep, "_evaluate", killed)
        sweep(flags, 130)
    assert len(json.loads((tmp_path / "out.json").read_text())["points"]) == 2

    def counted(self: Any, *arguments: Any) -> Any:
        passes.append(arguments)
        return evaluate(self, *arguments)

    monkeypatch.setattr(sweep_module.Sweep, "_evaluate", counted)
    resumed = sweep(flags)
    assert len(passes) == 3
    more = sweep(flags + " --lmbda 0.1 0.25 0.4")
    assert len(passes) == 3, "another lambda is only another mixture"
    assert [p for p in more["points"] if p["lmbda"] == 0.25] == resumed["points"]
    sweep(flags + " --knn-temp 1 7")
    assert len(passes) == 6
    kept = sweep("--strategy knnlm --k 256")
    assert len(kept["points"]) == 1 and len(kept["earlier_points"]) >= 12


def test_a_strategy_that_sets_its_own_weight_is_evaluated_for_each_lambda(
    sweep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight that follows from lambda is not mixed again but evaluated again, and a fixed one does not change."""
    (tmp_path / "my_ideas").mkdir()
    (tmp_path / "my_ideas" / "__init__.py").write_text(
        "import torch\n"
        "from fairseq.retrieval.retrievers import Proposal, register_retriever\n"
        "from fairseq.retrieval.retrievers.knnlm import KNNLMRetriever\n"
        "@register_retriever('halved_weight')\n"
        "class Halved(KNNLMRetriever):\n"
        "    def propose(self, step):\n"
        "        search = torch.ones(len(step), dtype=torch.bool)\n"
        "        return Proposal(search, None, torch.full((len(step),), self.resources.lmbda / 2))\n"
    )
    results = sweep(f"--user-dir {tmp_path / 'my_ideas'} --strategy knnlm halved_weight --k 256 --lmbda 0.2 0.4")
    expected = point(results, strategy="knnlm", lmbda=0.2)["loss_base2"]
    assert point(results, strategy="halved_weight", lmbda=0.4)["loss_base2"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--strategy nonsense", "--strategy: found 'nonsense'"),
        ("--strategy 'random_skip 0.5'", "a name, then flags"),
        ("--strategy \"random_skip 'x\"", "expected words as a shell reads them (No closing quotation)"),
        ("--strategy 'random_skip --skip 0.5'", "--skip 0.5; see fairseq-sweep --strategy random_skip --help"),
        ("--strategy 'retomaton --target-foss 0.5'", "--min-knns"),
        ("--members missing.pkl --k 8", "missing.pkl"),
        ("--min-knns -1", "--min-knns"),
        ("--label none", "--label: found 'none', expected WHAT=NAME"),
        ("--label ''", "--label: found the empty value ''"),
        ("--label =x", "which is one of: retomaton, none"),
        ("--label none=", "--label: found 'none=', expected"),
        ("--label knnlm=x", "--label: found 'knnlm=x'"),
        ("--label retomaton=x retomaton=y", "once for each WHAT"),
        ("--label 'retomaton=x\ny'", "a line of characters that can be printed"),
        ("--label retomaton=\udcff", "a line of characters that can be printed"),
        ("--strategy knnlm --label none=x", "found none=x, expected a name that a curve has"),
        ("--strategy retomaton retomaton_chains --label retomaton_chains=RetoMaton", "for two curves"),
        ("--column", "--column: found no --figure beside it"),
        ("--title x", "--title: found no --figure beside it"),
    ],
)
def test_mistakes_are_one_sentence(sweep: Any, flags: str, sentence: str) -> None:
    assert sentence in sweep(flags, 2).error


def test_a_method_is_named_by_the_flags_that_were_given() -> None:
    point = {"strategy": "retomaton_chains", "members": "a.pkl", "min_knns": 1, "chain_power": 4.0, "ngrams": None}
    assert method_name(point) == "retomaton_chains chain_power 4.0"


def test_help_shows_the_flags_of_the_strategies_named(run_cli: Any) -> None:
    plain = run_cli("sweep", ["--help"])
    assert plain.status == 0 and "--skip-probability P" not in plain.stdout
    assert "default: 0.25, where eval_lm.py has 0" in " ".join(plain.stdout.split())
    words = shlex.split("--strategy adaptret 'random_skip --skip-probability 1' retomaton_adaptret -h")
    named = run_cli("sweep", words)
    assert named.status == 0, named.stderr
    pattern = r"^Flags of --strategy (\S+), in the quotes:\n((?:  .*\n)+)"
    sections = dict(re.findall(pattern, named.stdout, re.MULTILINE))
    own = {name: set(re.findall(r"^  (--\S+)", text, re.MULTILINE)) for name, text in sections.items()}
    adaptret = {"--adaptret-checkpoint", "--adaptret-ngrams"}
    assert own == {
        "adaptret": adaptret,
        "random_skip": {"--skip-probability"},
        "retomaton_adaptret": adaptret | {"--gate-foss"},
    }
    assert "--strategy: found 'guess'" in run_cli("sweep", ["--help", "--strategy", "guess"]).error


@pytest.mark.parametrize("flag", ["--output", "--figure"])
def test_outputs_that_could_not_be_written_are_refused_at_once(flag: str, run_cli: Any, tmp_path: Path) -> None:
    """Before the scores are opened, which are missing here."""
    folder = tmp_path / ("out.csv" if flag == "--output" else "out-methods.svg")
    folder.mkdir()
    words = ["--scores", "missing", "--output", tmp_path / "o", *STORES, flag]
    error = run_cli("sweep", [*words, tmp_path / "out"], cwd=GOLDEN).error
    assert f"argument {flag}: found the folder {folder}" in error
    assert "missing" in run_cli("sweep", [*words, tmp_path / "other"], cwd=GOLDEN).error
    assert list(tmp_path.iterdir()) == [folder]


def test_figures(sweep: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sweep(
        f"--strategy knnlm 'random_skip --skip-probability 0.3' retomaton --members {MEMBERS} none --min-knns 1 20 "
        f"--k 256 --lmbda 0.25 0.5 --knn-temp 1 3 --figure {tmp_path / 'f'} --paper wikitext103 --column "
        f"--label none='no clusters' 'random_skip --skip-probability 0.3=skipping'"
    )
    for name in ("methods", "clusters", "lmbda-temp"):
        assert (tmp_path / f"f-{name}.png").read_bytes()[1:4] == b"PNG"
        assert (tmp_path / f"f-{name}.pdf").read_bytes()[:4] == b"%PDF"
    text = (tmp_path / "f-methods.svg").read_text()
    named = ("kNN-LM", "skipping", "RetoMaton", "RetoMaton, no clusters", "as published", "fraction of saved searches")
    assert all(label in text for label in named)
    text = (tmp_path / "f-clusters.svg").read_text()
    assert "k-means 400" in text and "no clusters" in text
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["saving_flags"]["random_skip"] == ["skip_probability", "target_foss"]
    assert "| always |" not in (tmp_path / "out.md").read_text()
    sweep("--strategy retomaton --k 256 --min-knns 9999999")
    assert "| always |" in (tmp_path / "out.md").read_text()


def test_target_foss(run_cli: Any, tmp_path: Path) -> None:
    """Chosen on all of the evaluated split, the share is reached, and one more demanded entry would miss it."""
    words = [*LM, *STORES, *FROM_CODES, "--knnlm", "--k", "256", "--lmbda", "0.25", "--results-json", tmp_path / "r"]
    done = run_cli("eval_lm", [*words, "--target-foss", "0.5"], cwd=GOLDEN)
    results = json.loads((tmp_path / "r").read_text())
    chosen = results["target_foss"]
    assert f"chose --min-knns {chosen['min_knns']}" in done.stderr
    assert chosen["tokens"] == results["num_tokens"]
    assert 50 <= results["searches_saved_percent"] == pytest.approx(chosen["saved_percent_when_chosen"])
    run_cli("eval_lm", [*words, "--min-knns", chosen["min_knns"] + 1], cwd=GOLDEN)
    assert json.loads((tmp_path / "r").read_text())["searches_saved_percent"] < 50

    elsewhere = ["--target-foss", "0.5", "--target-foss-subset", "test", "--target-foss-tokens", "300"]
    run_cli("eval_lm", [*words, *elsewhere, "--save-scores", tmp_path / "s", "--save-searches"], cwd=GOLDEN)
    results = json.loads((tmp_path / "r").read_text())
    assert results["target_foss"]["split"] == "test" and 300 <= results["target_foss"]["tokens"] < 400
    assert results["searches_saved_percent"] == pytest.approx(50, abs=10)
    done = run_cli("eval_lm", [*words, "--target-foss", "0.99", "--target-foss-tokens", "200"], cwd=GOLDEN)
    assert "out of reach; --min-knns 1" in done.stderr
    assert "--target-foss" in run_cli("eval_lm", [*words, "--no-pointer", "--target-foss", "0.5"], cwd=GOLDEN).error
    assert "--save-scores" in run_cli("eval_lm", [*words, "--save-searches"], cwd=GOLDEN).error


@pytest.mark.parametrize("flag", ["--members none", "--index exact", "--knn-temp 50", "--dstore-weights"])
def test_flags_of_the_sweep_are_refused_inside_the_quotes(sweep: Any, flag: str) -> None:
    """They would have no effect there, because the sweep combines values of its own."""
    assert "outside the quotes" in sweep(f"--strategy 'retomaton {flag}'", status=2).stderr


def test_points_of_other_keys_are_not_taken(sweep: Any, tmp_path: Path) -> None:
    """A datastore without a sidecar whose keys have changed is another datastore, where distances come from keys."""
    for name in ("keys", "vals"):
        content = (GOLDEN / "checkpoints" / f"dstore16_{name}.npy").read_bytes()
        (tmp_path / f"own_{name}.npy").write_bytes(content)
    flags = f"--dstore-filename {tmp_path}/own --strategy knnlm --k 64 --lmbda 0.5"
    sweep(flags, similarity=[])
    keys = np.fromfile(tmp_path / "own_keys.npy", "<f2")
    (keys * np.float16(0.5)).tofile(tmp_path / "own_keys.npy")
    assert "expected those of the files named" in sweep(flags, status=2, similarity=[]).stderr
