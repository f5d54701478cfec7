"""AdaptRet (He et al., 2021, section 3.2): a small network that predicts, before anything is searched, the weight that
retrieval should have for a token. For tokens with the smallest weights there is no search.

Features: the query (`ctxt`), the LM's largest probability and entropy (`lm_max`, `lm_ent`), and, for the last 1 to 4
tokens, how often they occur in the training text and by how many different words they are followed (`freq`, `fert`).
The released code uses order 1 only, and at evaluation reads `freq` and `fert` one token too early; this code follows
the paper.

The network is trained on held-out text to maximise the likelihood of the mixture, with an L1 penalty on retrieval's
weight. The checkpoint (a dictionary of tensors and plain values) has the network's parameters, a description of its
training, and thresholds: for each share of searches saved, the log-weight of the LM from which on there is no
search."""

from __future__ import annotations

import hashlib
import io
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from fairseq.errors import BadFile, UserError
from fairseq.files.array_files import read_digested, same_identity, write_digested
from fairseq.files.atomic_io import delay_interrupts, publish, staged, temporary_path, torch_writing
from fairseq.files.checksums import check_opened, describe_content
from fairseq.files.fingerprint import file_fingerprint
from fairseq.files.inputs import regular_size
from fairseq.files.sidecar import remove_sidecar, write_sidecar
from fairseq.files.torch_files import read_torch_file

logger = logging.getLogger(__name__)

KIND = "adaptret"
EXPECTED = "an AdaptRet checkpoint that fairseq-adaptret wrote"
REMEDY = "train one with fairseq-adaptret"
WIDTHS = {"ctxt": None, "lm_max": 1, "lm_ent": 1, "freq": 4, "fert": 4}  # None: the width of the queries
FEATURES = tuple(WIDTHS)
CUTOFFS = tuple(range(5, 100, 5))  # shares of searches saved, in percent, whose thresholds are stored
SELECTED_AT = 50  # the cutoff by whose held-out perplexity the best epoch is chosen
SMALLEST_WEIGHT = 1e-5


@dataclass(frozen=True)
class AdaptRetRecipe:
    """The settings of the network and its training; the defaults are the paper's."""

    features: tuple[str, ...] = FEATURES
    hidden: int = 128
    layers: int = 5
    dropout: float = 0.2
    l1: float = 0.05
    lr: float = 5e-4
    batch: int = 64
    epochs: int = 10
    seed: int = 927
    held_out: float = 0.1


@dataclass
class TrainingData:
    """Tokens of held-out text. features: name -> (N, width) float32; lm and knn: (N,) float32, log-probability of the
    right token in nats by the LM and by retrieval; groups: (N,) int64, the article (or sentence) of each token."""

    features: Mapping[str, NDArray[np.float32]]
    lm: NDArray[np.float32]
    knn: NDArray[np.float32]
    groups: NDArray[np.int64]


class AdaptRetNetwork(nn.Module):
    """Features -> (N, 2) log-weights: column 0 of the LM, column 1 of retrieval.

    Every feature except the query has a small network of its own, which widens it, so that it is not outweighed by the
    D numbers of the query."""

    def __init__(self, recipe: AdaptRetRecipe, dimension: int) -> None:
        super().__init__()
        self.small = tuple(name for name in recipe.features if name != "ctxt")
        self.has_query = "ctxt" in recipe.features
        width = dimension // max(1, len(self.small))
        self.inputs = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(WIDTHS[name] or dimension, width), nn.ReLU(), nn.Linear(width, width))
                for name in self.small
            }
        )
        size = (dimension if self.has_query else 0) + width * len(self.small)
        layers: list[nn.Module] = []
        for _ in range(recipe.layers):
            layers += [nn.Linear(size, recipe.hidden), nn.Dropout(recipe.dropout), nn.ReLU()]
            size = recipe.hidden
        self.body = nn.Sequential(*layers, nn.Linear(size, 2))

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """features: name -> (N, width) float32."""
        parts = [features["ctxt"]] if self.has_query else []
        parts += [self.inputs[name](features[name]) for name in self.small]
        return F.log_softmax(self.body(torch.cat(parts, 1)), 1)


@dataclass
class AdaptRet:
    """A trained network, its recipe, and log-weights of the LM per percentage of searches saved."""

    network: AdaptRetNetwork
    recipe: AdaptRetRecipe
    dimension: int
    thresholds: dict[int, float]
    info: dict[str, Any]

    @torch.no_grad()
    def weights(self, features: Mapping[str, Tensor]) -> Tensor:
        """(N, 2) log-weights of LM and retrieval."""
        self.network.eval()
        return self.network(features)

    def threshold(self, share: float) -> float:
        """The log-weight of the LM below which a token is searched so that a `share` of them (0 to 1) is not;
        between the stored cutoffs it is interpolated."""
        if share <= 0 or share >= 1:
            return np.inf if share <= 0 else -np.inf
        cutoffs = sorted(self.thresholds)
        return float(np.interp(100 * share, [0, *cutoffs], [0, *(self.thresholds[cutoff] for cutoff in cutoffs)]))

    def save(self, path: str) -> None:
        """Writes the checkpoint, atomically, and its sidecar."""
        state = {name: tensor.cpu() for name, tensor in self.network.state_dict().items()}
        content = {
            "adaptret": 1,
            "model": state,
            "recipe": {**asdict(self.recipe), "features": list(self.recipe.features)},
            "dimension": self.dimension,
            "thresholds": self.thresholds,
            "info": self.info,
        }
        with staged(path) as stream, torch_writing(stream) as output:
            torch.save(content, output)
        digests = {"checkpoint": describe_content(temporary_path(path))}
        with delay_interrupts():
            remove_sidecar(path)
            publish(temporary_path(path), path)
            write_sidecar(path, KIND, {"of": self.info.get("of", {}), "content": digests})

    @classmethod
    def load(cls, path: str) -> AdaptRet:
        """Reads a checkpoint that `save` wrote, without executing code; BadFile when it is something else. Memory is
        allocated only after all sizes have been compared with the tensors in the file."""
        regular_size(path, "check --adaptret-checkpoint, or train one with fairseq-adaptret")
        check_opened(path, {"checkpoint": path}, whole=True, remedy=REMEDY)
        try:
            content = read_torch_file(path, EXPECTED)
        except BadFile as error:
            raise BadFile(path, error.found, EXPECTED, REMEDY) from error
        if not isinstance(content, dict) or content.get("adaptret") != 1:
            raise BadFile(path, "another kind of file", EXPECTED, REMEDY)
        recipe = _checked_recipe(path, content.get("recipe"))
        parts: list[Any] = [content.get(name) for name in ("dimension", "thresholds", "info")]
        dimension, thresholds, info = parts
        network = _network_of(path, recipe, dimension, content.get("model"))
        if not _are_thresholds(thresholds) or not isinstance(info, dict):
            raise BadFile(path, "thresholds or a description of another form", EXPECTED, REMEDY)
        return cls(network, recipe, dimension, dict(thresholds), info)


def _checked_recipe(path: str, fields: Any) -> AdaptRetRecipe:
    """The recipe in a checkpoint; BadFile unless each number has the type of its default."""
    defaults = asdict(AdaptRetRecipe())
    if not isinstance(fields, dict) or set(fields) != set(defaults):
        raise BadFile(path, "a recipe with other fields", EXPECTED, REMEDY)
    features = fields["features"]
    if not isinstance(features, list) or not features or not all(type(f) is str and f in WIDTHS for f in features):
        raise BadFile(path, f"the features {features!r:.80}", f"some of {', '.join(FEATURES)}", REMEDY)
    for name, default in defaults.items():
        fitting = (int, float) if isinstance(default, float) else (int,)
        if name != "features" and not (type(fields[name]) in fitting and math.isfinite(fields[name])):
            raise BadFile(path, f"{name} {fields[name]!r:.80}", f"a value of type {type(default).__name__}", REMEDY)
    if not 0 <= fields["dropout"] <= 1 or min(fields["hidden"], fields["layers"]) < 1:
        raise BadFile(path, "a recipe of no network", EXPECTED, REMEDY)
    return AdaptRetRecipe(**{**fields, "features": tuple(features)})


def _network_of(path: str, recipe: AdaptRetRecipe, dimension: Any, parameters: Any) -> AdaptRetNetwork:
    """The network of `parameters`. To find the shapes that they must have, it is first built on the meta device,
    without memory."""
    widest = regular_size(path)  # no layer whose numbers are in the file can be wider
    good = type(dimension) is int and 1 <= dimension <= widest >= recipe.hidden and isinstance(parameters, dict)
    tensors: list[Any] = list(parameters.values()) if good else [None]
    if not all(isinstance(t, Tensor) and t.dtype == torch.float32 and t.is_contiguous() for t in tensors):
        raise BadFile(path, "parameters that are not tensors of numbers", EXPECTED, REMEDY)
    if recipe.layers > len(tensors):  # each layer has two
        raise BadFile(path, f"{len(tensors)} parameters for {recipe.layers} layers", EXPECTED, REMEDY)
    with torch.device("meta"):
        network = AdaptRetNetwork(recipe, dimension)
    wanted = {name: tensor.shape for name, tensor in network.state_dict().items()}
    if {name: tensor.shape for name, tensor in parameters.items()} != wanted:
        found = f"parameters that do not fit {recipe.layers} layers of {recipe.hidden} for queries of width {dimension}"
        raise BadFile(path, found, EXPECTED, REMEDY)
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise BadFile(path, "a parameter that is not finite", EXPECTED, REMEDY)
    network.load_state_dict(parameters, assign=True)
    return network


def _are_thresholds(thresholds: Any) -> bool:
    """Log-weights by percentage, for each of CUTOFFS or for none."""
    if not isinstance(thresholds, dict) or (thresholds and set(thresholds) != set(CUTOFFS)):
        return False
    return all(type(k) is int and isinstance(v, float) and math.isfinite(v) for k, v in thresholds.items())


def loss_of(log_weights: Tensor, lm: Tensor, knn: Tensor, l1: float) -> Tensor:
    """Minus the mean log-probability of the mixture, plus `l1` times the mean weight of retrieval."""
    mixture = torch.logsumexp(log_weights + torch.stack([lm, knn], 1), 1)
    return -mixture.mean() + l1 * log_weights[:, 1].exp().mean()


def threshold_at(lm_log_weights: NDArray[np.float32], cutoff: int) -> float:
    """The log-weight of the LM such that `cutoff` percent of the tokens have at least it and so are not searched:
    element int(N (1 - cutoff / 100)) in ascending order."""
    ascending = np.sort(lm_log_weights)
    return float(ascending[min(int(len(ascending) * (1 - cutoff / 100)), len(ascending) - 1)])


def perplexity_at(log_weights: NDArray[np.float32], lm: NDArray[Any], knn: NDArray[Any], threshold: float) -> float:
    """Perplexity when tokens whose LM log-weight is at least `threshold` use the LM alone."""
    mixed = np.logaddexp(log_weights[:, 0] + lm, log_weights[:, 1] + knn)
    return float(np.exp(-np.where(log_weights[:, 0] < threshold, mixed, lm).mean(dtype=np.float64)))


def split_groups(groups: NDArray[np.int64], share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of tokens (training, held out): whole groups are held out, a random `share` of them, but at least
    one and not all."""
    names = np.random.default_rng(seed).permutation(np.unique(groups))
    if len(names) < 2:
        raise UserError(f"found {len(names)} group of tokens to train on, expected at least 2; use a longer split")
    held_out = np.isin(groups, names[: min(max(1, int(len(names) * share)), len(names) - 1)])
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def train(
    data: TrainingData, recipe: AdaptRetRecipe, path: str, info: dict[str, Any], progress: bool = True
) -> AdaptRet:
    """Trains, writes the best epoch to `path`, and returns it. After every epoch the state is saved in `PATH.last`,
    from which the same command continues after a kill; the result is the same as without an interruption."""
    return _Training(data, recipe, path, info).run(progress)


class _Training:
    def __init__(self, data: TrainingData, recipe: AdaptRetRecipe, path: str, info: dict[str, Any]) -> None:
        self.recipe, self.path, self.info, self.last = recipe, path, info, path + ".last"
        self.dimension = data.features["ctxt"].shape[1]
        rows, held_out = split_groups(data.groups, recipe.held_out, recipe.seed)
        self.train_set, self.held_out = (_Tokens(data, chosen, recipe.features) for chosen in (rows, held_out))
        torch.manual_seed(recipe.seed)
        self.network = AdaptRetNetwork(recipe, self.dimension)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=recipe.lr)
        self.epoch, self.best = 0, float("inf")
        self.identity = self._identity()

    def run(self, progress: bool) -> AdaptRet:
        self._resume()
        rows = len(self.train_set.lm)
        said = "AdaptRet: %d tokens to train on, %d held out; features %s"
        logger.info(said, rows, len(self.held_out.lm), ", ".join(self.recipe.features))
        while self.epoch < self.recipe.epochs:
            self.epoch += 1
            torch.manual_seed(self.recipe.seed + self.epoch)  # so that dropout is the same after a restart
            order = torch.from_numpy(np.random.default_rng([self.recipe.seed, self.epoch]).permutation(rows))
            self.network.train()
            total = 0.0
            batches = order.split(self.recipe.batch)
            for batch in tqdm(batches, desc=f"epoch {self.epoch}", unit="batch", disable=None if progress else True):
                features, lm, knn = self.train_set.at(batch)
                loss = loss_of(self.network(features), lm, knn, self.recipe.l1)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                total += loss.item() * len(batch)
            self._validate(total / rows)
        if os.path.exists(self.last):
            os.unlink(self.last)
        return AdaptRet.load(self.path)

    def _validate(self, loss: float) -> None:
        result = AdaptRet(self.network, self.recipe, self.dimension, {}, {})
        log_weights = result.weights(self.held_out.features).numpy()
        lm, knn = self.held_out.lm.numpy(), self.held_out.knn.numpy()
        thresholds = {cutoff: threshold_at(log_weights[:, 0], cutoff) for cutoff in CUTOFFS}
        curve = {cutoff: perplexity_at(log_weights, lm, knn, thresholds[cutoff]) for cutoff in CUTOFFS}
        curve[0] = perplexity_at(log_weights, lm, knn, np.inf)
        selected = curve[SELECTED_AT]
        said = "epoch %d: loss %.4f; held out: perplexity %.3f with all searches, %.3f with %d %% of them saved"
        logger.info(said, self.epoch, loss, curve[0], selected, SELECTED_AT)
        if selected < self.best:
            self.best = selected
            figures = {"epoch": self.epoch, "held_out_perplexity": curve, "lm_perplexity": float(np.exp(-lm.mean()))}
            replace(result, thresholds=thresholds, info={**self.info, **figures}).save(self.path)
        state = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        stream = io.BytesIO()
        torch.save({**state, "epoch": self.epoch, "best": self.best, "file": self._file()}, stream)
        write_digested(self.last, self.identity, {"state": np.frombuffer(stream.getvalue(), np.uint8)})

    def _file(self) -> str:
        """The fingerprint of the best checkpoint so far."""
        return file_fingerprint(self.path) if os.path.exists(self.path) else ""

    def _identity(self) -> dict[str, Any]:
        digests = [part.digest() for part in (self.train_set, self.held_out)]
        recipe = {**asdict(self.recipe), "features": list(self.recipe.features)}
        return {**recipe, "dimension": self.dimension, "tokens": digests, "of": self.info.get("of", {})}

    def _resume(self) -> None:
        """Continues after the last epoch of an unfinished run with the same data and recipe."""
        if not (os.path.exists(self.last) and os.path.exists(self.path)):
            return
        try:
            identity, arrays = read_digested(self.last)
        except BadFile as error:
            logger.warning("%s; training from the beginning", error)
            return
        if not same_identity(identity, self.identity) or set(arrays) != {"state"}:
            said = "%s: an unfinished training on other data or by another recipe; training from the beginning"
            logger.warning(said, self.last)
            return
        state = torch.load(io.BytesIO(arrays["state"].tobytes()), map_location="cpu", weights_only=True)
        if state["file"] != self._file():
            said = "%s: not the checkpoint from which %s continues; training from the beginning"
            logger.warning(said, self.path, self.last)
            return
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.best = state["epoch"], state["best"]
        logger.info("continuing after epoch %d", self.epoch)


class _Tokens:
    """Some rows of the training data as tensors."""

    def __init__(self, data: TrainingData, rows: NDArray[np.int64], features: tuple[str, ...]) -> None:
        self.features = {name: torch.from_numpy(np.asarray(data.features[name][rows], np.float32)) for name in features}
        self.lm, self.knn = torch.from_numpy(data.lm[rows]), torch.from_numpy(data.knn[rows])

    def at(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        return {name: values[rows] for name, values in self.features.items()}, self.lm[rows], self.knn[rows]

    def digest(self) -> str:
        """BLAKE2b-128 of all numbers, in order."""
        digest = hashlib.blake2b(digest_size=16)
        for values in (*self.features.values(), self.lm, self.knn):
            digest.update(values.contiguous().numpy().reshape(-1).view(np.uint8).data)
        return digest.hexdigest()
