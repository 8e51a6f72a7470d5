"""Attention-based multiple-instance learning on stored features: each bag has a label, and no patch has one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from jaxtyping import Float, Float64, Int64, Shaped

from g2l_core.errors import TaskError
from g2l_core.metrics.bags import bag_rows
from g2l_core.metrics.folds import stratified_group_folds
from g2l_core.metrics.rows import require_finite, row_blocks
from g2l_core.metrics.statistics import require_aligned
from g2l_core.rng import keyed_generator

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class AbmilSettings:
    """Settings of the training of gated attention. The defaults are for some hundred bags."""

    width: int = 128
    """Width of a patch's embedding h: one layer with ReLU on the standardized features."""
    attention_width: int = 64
    """Rows of V and U."""
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    """AdamW's."""
    bags_per_step: int = 4
    """Number of bags whose mean loss a step minimizes."""
    most_epochs: int = 100
    patience: int = 15
    """Epochs without a lower validation loss before training stops."""
    most_patches: int = 4096
    """Maximum number of patches of a training or validation bag; from a larger one, as many are drawn. Test bags are
    read whole."""
    class_balanced: bool = True
    """Weight a bag's loss by 1 / its class's share, so that classes have equal weight."""
    folds: int = 5
    """Number of folds of the training patients; one of them is the validation part."""


@dataclass(frozen=True, kw_only=True)
class AbmilResult:
    """Predictions of the trained network for the test bags."""

    classes: Shaped[np.ndarray, " class"]
    """Sorted; the columns of `probabilities`."""
    bags: Shaped[np.ndarray, " bag"]
    """Sorted test bags."""
    probabilities: Float64[np.ndarray, "bag class"]
    attention: Float64[np.ndarray, " row"]
    """Attention of each test patch; it sums to 1 over its bag."""
    epochs: int
    """Epoch with the lowest validation loss, whose weights are used."""
    validation_loss: float
    """Mean cross-entropy of the validation bags at that epoch, weighted as in training."""
    network: "AbmilNetwork"
    """The trained network, for bags that come later."""

    @property
    def predictions(self) -> Shaped[np.ndarray, " bag"]:
        """The most probable class of each test bag."""
        return self.classes[self.probabilities.argmax(axis=1)]


def train_abmil(
    train: Float[np.ndarray, "train dim"],
    train_bags: Shaped[np.ndarray, " train_row"],
    labels: Shaped[np.ndarray, " bag"],
    patients: Shaped[np.ndarray, " patient_bag"],
    test: Float[np.ndarray, "test test_dim"],
    test_bags: Shaped[np.ndarray, " test_row"],
    *,
    settings: AbmilSettings | None = None,
    seed: int,
) -> AbmilResult:
    """Train gated attention on the training bags and apply it to the test bags, on the CPU.

    With h_k the embedding of patch k, a_k = softmax over the bag of w' (tanh(V h_k) * sigmoid(U h_k)). The bag
    is z = sum_k a_k h_k, and its class scores are linear in z.

    The same seed gives the same bits with the same number of threads. The order of patches in a bag, and of
    bags, changes rounding only, as long as no bag is larger than `most_patches`.

    Args:
        train: (train, dim) features of the training patches; any float type. All are standardized with their common
            mean and deviation.
        train_bags: (train,) bag of each.
        labels: (bag,) class of each training bag, in the order of their sorted names (`bags.bag_values`).
        patients: (bag,) patient of each training bag. None is both trained on and validated on.
        test: (test, dim) features of the test patches.
        test_bags: (test,) bag of each.
        settings: None uses the defaults.
        seed: Random seed of the first weights, the validation part, the order of bags and the patches drawn.

    Returns:
        The predictions, the attention, and the chosen epoch.

    Raises:
        TaskError: If there is one class only, a class has fewer patients than folds, the lengths or widths
            differ, a feature is not finite, a setting is below 1, or the loss is never finite.

    References:
        Ilse, Tomczak & Welling, Attention-based Deep Multiple Instance Learning (2018), equations 7 and 9.

    Examples:
        >>> features, bags = np.repeat([[0.0], [1.0]] * 4, 3, axis=0), np.repeat(np.arange(8), 3)
        >>> settings = AbmilSettings(width=4, attention_width=2, learning_rate=0.05, most_epochs=20, folds=2)
        >>> data = features, bags, np.tile([0, 1], 4), np.arange(8), features, bags
        >>> result = train_abmil(*data, settings=settings, seed=0)
        >>> result.predictions.tolist(), result.attention[:3].round(3).tolist()
        ([0, 1, 0, 1, 0, 1, 0, 1], [0.333, 0.333, 0.333])
    """
    settings = settings or AbmilSettings()
    counts = (settings.width, settings.attention_width, settings.bags_per_step, settings.most_epochs)
    if min(*counts, settings.patience, settings.most_patches) < 1:
        raise TaskError(f"widths, bags, epochs, patience and patches are at least 1; got {settings}")
    require_aligned(train=len(train), train_bags=len(train_bags))
    require_aligned(test=len(test), test_bags=len(test_bags))
    require_aligned(train_dim=train.shape[1], test_dim=test.shape[1])
    require_finite(train, "the training features")
    require_finite(test, "the test features")
    members = bag_rows(train_bags)
    require_aligned(training_bags=len(members), labels=len(labels), patients=len(patients))
    classes, codes = np.unique(labels, return_inverse=True)
    fit, held = stratified_group_folds(labels, patients, settings.folds, seed=seed)[0]
    members = [_drawn(rows, settings.most_patches, seed, name) for name, rows in enumerate(members)]
    scale = _Scale.of(train)
    weights = len(fit) / (len(classes) * np.bincount(codes[fit])) if settings.class_balanced else np.ones(len(classes))
    task = _Task(features=train, members=members, scale=scale, codes=codes, weights=weights, fit=fit, held=held)
    network, epochs, loss = _train(task, settings, seed)
    trained = AbmilNetwork(weights=network, scale=scale)
    logs, attention = trained.apply(test, bag_rows(test_bags))
    return AbmilResult(
        classes=classes,
        bags=np.unique(test_bags),
        probabilities=np.exp(logs),
        attention=attention,
        epochs=epochs,
        validation_loss=loss,
        network=trained,
    )


def _drawn(rows: Int64[np.ndarray, " member"], limit: int, seed: int, bag: int) -> Int64[np.ndarray, " drawn"]:
    if len(rows) <= limit:
        return rows
    return np.sort(keyed_generator("abmil patches", seed, bag).choice(rows, limit, replace=False))


@dataclass(frozen=True, kw_only=True)
class _Scale:
    """Standardizes features to float32 tensors."""

    mean: Float64[np.ndarray, " dim"]
    deviation: Float64[np.ndarray, " dim"]

    @classmethod
    def of(cls, features: Float[np.ndarray, "row dim"]) -> "_Scale":
        mean = features.mean(axis=0, dtype=np.float64)
        squares = sum(
            np.square(features[rows].astype(np.float64) - mean).sum(axis=0) for rows in row_blocks(len(features))
        )
        deviation = np.sqrt(squares / len(features))
        return cls(mean=mean, deviation=np.where(deviation > 0, deviation, 1.0))

    def tensor(self, features: Float[np.ndarray, "row dim"]) -> "torch.Tensor":
        import torch

        centered = features.astype(np.float32) - self.mean.astype(np.float32)
        return torch.from_numpy(centered / self.deviation.astype(np.float32))


_Network: TypeAlias = Mapping[str, "torch.Tensor"]


@dataclass(frozen=True, kw_only=True)
class AbmilNetwork:
    """A trained network with the scale of its features."""

    weights: _Network
    scale: _Scale

    def apply(
        self, features: Float[np.ndarray, "row dim"], members: Sequence[Int64[np.ndarray, "_"]]
    ) -> tuple[Float64[np.ndarray, "bag class"], Float64[np.ndarray, " row"]]:
        """Predict bags.

        Args:
            features: (row, dim) features of patches.
            members: The rows of each bag; every row is in one.

        Returns:
            (bag, class) log-probabilities, and (row,) attention, which sums to 1 over each bag.
        """
        import torch

        attention = np.empty(len(features))
        logs = []
        with torch.no_grad():
            for rows in members:
                logits, weights = _forward(self.weights, self.scale.tensor(features[rows]), [len(rows)])
                logs.append(logits.double().log_softmax(dim=1).numpy())
                attention[rows] = weights.double().numpy()
        return np.concatenate(logs), attention

    def patch_log_probabilities(self, features: Float[np.ndarray, "row dim"]) -> Float64[np.ndarray, "row class"]:
        """Predict every patch as a bag of its own, whose attention is 1; (row, class)."""
        import torch
        from torch.nn.functional import linear

        network, logs = self.weights, []
        with torch.no_grad():
            for rows in row_blocks(len(features)):
                h = linear(self.scale.tensor(features[rows]), network["embed"], network["embed_bias"]).relu()
                logits = linear(h, network["classify"], network["classify_bias"])
                logs.append(logits.double().log_softmax(dim=1).numpy())
        return np.concatenate(logs)

    def scores(
        self, features: Float[np.ndarray, "row dim"]
    ) -> tuple[Float64[np.ndarray, " row"], Float64[np.ndarray, "row width"]]:
        """Return the attention score of each patch before the softmax over its bag, and its embedding h."""
        import torch
        from torch.nn.functional import linear

        network, found = self.weights, []
        with torch.no_grad():
            for rows in row_blocks(len(features)):
                h = linear(self.scale.tensor(features[rows]), network["embed"], network["embed_bias"]).relu()
                found.append((_scores(network, h).double().numpy(), h.double().numpy()))
        return np.concatenate([s for s, _ in found]), np.concatenate([h for _, h in found])

    def bag_log_probabilities(self, z: Float64[np.ndarray, "bag width"]) -> Float64[np.ndarray, "bag class"]:
        """Predict bags from their z, the mean embedding by attention; (bag, class) log-probabilities."""
        import torch
        from torch.nn.functional import linear

        network = self.weights
        with torch.no_grad():
            logits = linear(torch.from_numpy(z), network["classify"].double(), network["classify_bias"].double())
        return logits.log_softmax(dim=1).numpy()

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the weights and the scale by name, for a file."""
        arrays = {name: tensor.detach().numpy() for name, tensor in self.weights.items()}
        return {**arrays, "mean": self.scale.mean, "deviation": self.scale.deviation}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "AbmilNetwork":
        """Return the network that `to_arrays` gave."""
        import torch

        weights = {n: torch.from_numpy(np.array(a)) for n, a in arrays.items() if n not in {"mean", "deviation"}}
        return cls(weights=weights, scale=_Scale(mean=arrays["mean"], deviation=arrays["deviation"]))


@dataclass(frozen=True, kw_only=True)
class _Task:
    features: Float[np.ndarray, "row dim"]
    """Not standardized; each step standardizes its own bags, in float32."""
    members: Sequence[Int64[np.ndarray, "_"]]
    """The rows of each bag."""
    scale: _Scale
    codes: Int64[np.ndarray, " bag"]
    weights: Float64[np.ndarray, " class"]
    """Of the loss."""
    fit: Int64[np.ndarray, " fit"]
    held: Int64[np.ndarray, " held"]


def _first_weights(dim: int, classes: int, settings: AbmilSettings, seed: int) -> dict[str, "torch.Tensor"]:
    """Draw Glorot's uniform weights; biases are 0."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "embed": (settings.width, dim),
        "V": (settings.attention_width, settings.width),
        "U": (settings.attention_width, settings.width),
        "w": (1, settings.attention_width),
        "classify": (classes, settings.width),
    }
    network = {name: torch.empty(shape) for name, shape in shapes.items()}
    for weight in network.values():
        torch.nn.init.xavier_uniform_(weight, generator=generator)
    biases = {f"{name}_bias": torch.zeros(shapes[name][0]) for name in ("embed", "V", "U", "classify")}
    return {name: value.requires_grad_() for name, value in (network | biases).items()}


def _forward(network: _Network, patches: "torch.Tensor", sizes: Sequence[int]) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Return the logits (bag, class) of bags whose patches come one bag after another, and the attention (patch,)."""
    import torch
    from torch.nn.functional import linear

    h = linear(patches, network["embed"], network["embed_bias"]).relu()
    attention = [part.softmax(dim=0) for part in _scores(network, h).split(sizes)]
    z = torch.stack([a @ part for a, part in zip(attention, h.split(sizes), strict=True)])
    return linear(z, network["classify"], network["classify_bias"]), torch.cat(attention)


def _scores(network: _Network, h: "torch.Tensor") -> "torch.Tensor":
    """Return w' (tanh(V h) * sigmoid(U h)) of each patch (patch,)."""
    from torch.nn.functional import linear

    tangent = linear(h, network["V"], network["V_bias"]).tanh()
    gate = linear(h, network["U"], network["U_bias"]).sigmoid()
    return linear(tangent * gate, network["w"])[:, 0]


def _losses(network: _Network, task: _Task, numbers: Int64[np.ndarray, " bag"]) -> "torch.Tensor":
    """Return the weighted cross-entropy of each bag (bag,)."""
    import torch

    rows = [task.members[number] for number in numbers]
    patches = task.scale.tensor(task.features[np.concatenate(rows)])
    logits, _ = _forward(network, patches, [len(part) for part in rows])
    codes = task.codes[numbers]
    chosen = logits.log_softmax(dim=1)[torch.arange(len(codes)), torch.from_numpy(codes)]
    return -chosen * torch.from_numpy(task.weights[codes])


def _train(task: _Task, settings: AbmilSettings, seed: int) -> tuple[_Network, int, float]:
    """Return the weights of the epoch with the lowest validation loss, that epoch, and that loss."""
    import torch

    network = _first_weights(task.features.shape[1], len(task.weights), settings, seed)
    optimizer = torch.optim.AdamW(list(network.values()), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    best, best_epoch, lowest = network, 0, np.inf
    for epoch in range(1, settings.most_epochs + 1):
        order = keyed_generator("abmil order", seed, epoch).permutation(task.fit)
        for step in _chunks(order, settings.bags_per_step):
            optimizer.zero_grad()
            _losses(network, task, step).mean().backward()
            optimizer.step()
        with torch.no_grad():
            parts = [_losses(network, task, step) for step in _chunks(task.held, settings.bags_per_step)]
        loss = float(torch.cat(parts).mean())
        if loss < lowest:
            best, best_epoch, lowest = {name: value.detach().clone() for name, value in network.items()}, epoch, loss
        elif epoch - best_epoch >= settings.patience:
            break
    if not best_epoch:
        raise TaskError(f"the validation loss was never finite; lower the learning rate of {settings.learning_rate}")
    return best, best_epoch, lowest


def _chunks(numbers: Int64[np.ndarray, " bag"], size: int) -> list[Int64[np.ndarray, "_"]]:
    return np.split(numbers, range(size, len(numbers), size))
