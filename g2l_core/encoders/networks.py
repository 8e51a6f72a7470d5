"""Choose the network of a weights file that is loaded, where the file holds several of them.

Checkpoints of training hold the averaged weights beside those of the last step, or a student beside its teacher. The
rule: a network that the user names; else the averaged one (EMA), as timm has it; else the only one that fits the
architecture. Two that fit and differ are refused.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from g2l_core.encoders.weight_files import ADAPTER_ADVICE
from g2l_core.encoders.weight_layouts import in_wanted_names, state_dict_in_timm_layout, without_prefix
from g2l_core.errors import EncoderError

_NO_NETWORK = re.compile(r"(?i)optim|sched|scaler|loss|callback|rng|queue")
"""Keys of a checkpoint whose tensors are the state of training."""

_AVERAGED = re.compile(r"(?i)(^|_)ema(_|$)")
_ADAPTER = re.compile(
    r"\.(lora_\w+|hada_\w+|ia3_\w+|oft_\w+|base_layer)(\.|$)|^base_model\.model\.|^prompt_embeddings$"
)
_FLATTENED = re.compile(r"(^|\.)_?flat_param")
_DEPTH = 4


@dataclass(frozen=True, kw_only=True)
class ChosenNetwork:
    """A network of a weights file, in the names that the architecture wants."""

    state: Mapping[str, Tensor]
    key: str = ""
    """Where it stands in the file; empty for a plain state dict."""
    passed_over: tuple[str, ...] = ()
    """The other networks of the file that were not taken."""

    @property
    def note(self) -> str:
        """What was chosen, for people; empty where there was no choice."""
        others = " and ".join(map(repr, self.passed_over))
        return f"the network {self.key!r} of its weights file is taken, not {others}" if others else ""


def networks_in(content: object, key: str = "", depth: int = _DEPTH) -> dict[str, dict[str, Tensor]]:
    """The state dicts of a file's content by the key that holds each; a plain one has an empty key."""
    if not isinstance(content, Mapping) or not content or not all(isinstance(name, str) for name in content):
        return {}
    if all(isinstance(tensor, Tensor) for tensor in content.values()):
        return {key: dict(content)}
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in content.items() if depth else ():
        if not _NO_NETWORK.search(name):
            inner = networks_in(value, name, depth - 1)
            found |= {(f"{name}-{k}" if k in found else k): state for k, state in inner.items()}
    return found


def choose_network(
    networks: Mapping[str, Mapping[str, Tensor]],
    wanted: Mapping[str, Tensor],
    *,
    layout: str,
    name: str,
    file: str,
    asked: str = "",
) -> ChosenNetwork:
    """Choose a network of a weights file by the rule of this module.

    Args:
        networks: As `networks_in` gives them.
        wanted: The architecture's own state dict, for names and shapes.
        layout: One of `weight_layouts.LAYOUTS`.
        name: The encoder, for messages.
        file: The weights file, for messages.
        asked: The key of the network that the user wants.

    Raises:
        EncoderError: None fits, several fit, there is none of the key that is asked for, or it is a PEFT adapter.
    """
    for state in networks.values():
        _refuse_parts(state, file)
    parts = {
        (inner or key) if len(networks) == 1 else "-".join(filter(None, (key, inner))): state
        for key, whole in networks.items()
        for inner, state in _parts(in_wanted_names(whole, wanted), wanted).items()
    }
    if asked:
        parts = _asked(asked, parts, networks, file)
    elif averaged := {key: state for key, state in parts.items() if _AVERAGED.search(key)}:
        passed_over = tuple(key for key in parts if key not in averaged)
        return _only(averaged, wanted, layout, name, file, passed_over)
    return _only(parts, wanted, layout, name, file, ())


def _refuse_parts(state: Mapping[str, Tensor], file: str) -> None:
    """Refuse what is no whole network by the names of its tensors."""
    for key in state:
        if _ADAPTER.search(key):
            raise EncoderError(f"{file} {ADAPTER_ADVICE}. Its first tensor is {key}")
        if _FLATTENED.search(key):
            raise EncoderError(
                f"{file} holds flattened parameters of FSDP ({key}), without the shapes of the network's own. Save it "
                "with StateDictType.FULL_STATE_DICT"
            )


def _parts(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Mapping[str, Tensor]]:
    """A state dict, or the networks in it by their first name, where several tensors have one name without prefix."""
    if any(key in wanted for key in state) or len({without_prefix(key) for key in state}) == len(state):
        return {"": state}
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        first, dot, rest = key.partition(".")
        if dot:
            groups.setdefault(first, {})[rest] = tensor
    inner = {first: _parts(group, wanted) for first, group in groups.items() if not _NO_NETWORK.search(first)}
    return {key or first: part for first, group in inner.items() for key, part in group.items()}


def _asked(
    asked: str,
    parts: Mapping[str, Mapping[str, Tensor]],
    networks: Mapping[str, Mapping[str, Tensor]],
    file: str,
) -> dict[str, Mapping[str, Tensor]]:
    """The network that the user wants: by its key, or by a name that stands before its tensors."""
    if asked in parts or asked in networks:
        return {asked: parts.get(asked) or networks[asked]}
    below = re.compile(rf"^(?:.*\.)?{re.escape(asked)}\.(.+)$")
    found = {
        fit[1]: tensor for state in networks.values() for key, tensor in state.items() if (fit := below.match(key))
    }
    if not found:
        there = ", ".join(filter(None, parts)) or "a single network without a key"
        raise EncoderError(f"{file} has no network {asked!r}; it holds {there}")
    return {asked: found}


def _only(
    parts: Mapping[str, Mapping[str, Tensor]],
    wanted: Mapping[str, Tensor],
    layout: str,
    name: str,
    file: str,
    passed_over: tuple[str, ...],
) -> ChosenNetwork:
    """The only network that fits, or one of several that are equal.

    Raises:
        EncoderError: None fits, or several.
    """
    fitting, why = dict[str, dict[str, Tensor]](), ""
    for key, state in parts.items():
        try:
            fitting[key] = state_dict_in_timm_layout(state, layout, wanted, name)
        except EncoderError as error:
            why = why or (f"{error} (the network {key!r} of {file})" if key else str(error))
    if not fitting:
        others = " or ".join(f"{file}#{key}" for key in passed_over)
        raise EncoderError(f"{why}. --weights {others} takes another of its networks" if others else why)
    chosen, *same = fitting
    if any(not _are_equal(fitting[chosen], fitting[key]) for key in same):
        keys = list(fitting)
        choices = " or ".join(f"--weights {file}#{key}" for key in keys)
        raise EncoderError(
            f"{name}: {file} holds {len(keys)} networks that fit and differ: {', '.join(keys)}. Choose one: {choices}"
        )
    passed_over = (*passed_over, *(key for key in parts if key != chosen))
    return ChosenNetwork(state=fitting[chosen], key=chosen, passed_over=passed_over)


def _are_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[key]) for key, tensor in one.items())
