"""Sampling options as one flat list: how recipes' YAML and command lines name them, and records and runs once did."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..matching.objectives import Objective
from ..utils.configs import ImportOptions
from ..utils.values import Named
from .call import Plain, Sampling, SamplingMethod
from .methods import Combined, NOpt, Released


_NOPT = {"optimize_from": "start", "optimize_until": "stop", "step_size": "step_size", "step_decay": "step_decay",
         "lookahead": "lookahead"}  # fmt: skip
_OF_OBJECTIVE = ("contrast", "regularization")
FLAT = ("objective", "optimization_steps", *_NOPT, *_OF_OBJECTIVE, "classifier_objective")


def from_flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with the method as one object, `method`, in place of the flat names in `FLAT`; others stay as they are.

    Args:
        options: `objective` ("quantile" is the released algorithm), `optimization_steps` (0 is plain sampling),
            `optimize_from`, `contrast`, ..., and any others. Without a flat name among them, nothing changes.

    Raises:
        ValueError: for values that cannot be.
    """
    given = {name: options[name] for name in FLAT if options.get(name) is not None}
    others = {name: value for name, value in options.items() if name not in FLAT}
    return {**others, "method": _method(given)} if given else others


def _method(given: Mapping[str, Any]) -> SamplingMethod:
    # what it was when records left it out
    asked, iterations = given.get("objective", "rkhs"), given.get("optimization_steps")
    if iterations == 0:
        return Plain()
    counted = {} if iterations is None else {"iterations": iterations}
    if asked == "quantile":
        interval = {"start": given.get("optimize_from", 0.6), "stop": given.get("optimize_until", 1.0)}
        return Released(**interval, **counted)
    told = Objective.told(asked)
    kind = Objective.kind_of(told["name"])
    # flat options are those of built-ins: one's own may have others by the same names, with their defaults
    known = set() if ":" in kind.name else {field.name for field in dataclasses.fields(kind)}
    fields = {name: given[name] for name in _OF_OBJECTIVE if name in given and name in known}
    if kind.name == "classifier":
        fields = dict(given.get("classifier_objective", {}))
    # 0.6 was the beginning when records could leave it out
    named = {"start": 0.6} | {field: given[name] for name, field in _NOPT.items() if name in given}
    return NOpt(objective={**fields, **told}, **named, **counted)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(ImportOptions):
    """How images are drawn, as command lines and files name it.

    Attributes:
        objective: "rkhs", "ridge" or "classifier" of NOpt, see `dsco_hf.matching.objectives`, or "quantile", the
            released algorithm; or one of your own, "module:Class", with fields `{name: module:Class, field: value}`.
        method: what steers the sampling in place of NOpt: a peer, or one of your own, likewise, which has options of
            its own; or several that go together, "d4m+nopt".
        num_inference_steps: sampling steps; the method's own if none: 16 of NOpt, 50 of others.
        guidance_scale: classifier-free guidance; 1 is off.
        eta: 1 is ancestral sampling; smaller values leave less noise to optimise, 0 none.
        batch_size: images per pass through denoiser, decoder and classifier; all of a call at once if none.
        optimization_steps: updates of the noise at each of the optimised sampling steps; 0 draws plain samples.
        optimize_from, optimize_until: where NOpt begins and ends, as fractions of the sampling steps.
        step_size: length of NOpt's first update, in units of the noise's norm.
        step_decay: NOpt's update at the last sampling step is this times `step_size`; in between it falls evenly.
        lookahead: how NOpt predicts the images: "conditional" asks the denoiser again without guidance, "guided" with
            it, "none" reuses its last answer.
        contrast: of "rkhs": how far a class aims away from the mean over all classes; 0 matches the class itself.
        regularization: of "ridge": λ of the regression.
        block_size: images of a class that are optimised jointly.
        images_per_call: of several classes, at most; smaller calls occupy more processes.
    """

    objective: Named = "ridge"
    method: Named = "nopt"
    guidance_scale: float = 4.0
    num_inference_steps: int | None = None
    eta: float = 1.0
    optimization_steps: int | None = None
    step_size: float = 1.0
    step_decay: float = 0.25
    optimize_from: float = 0.0
    optimize_until: float = 1.0
    lookahead: str = "conditional"
    contrast: float = 0.0
    regularization: float = 2.0
    batch_size: int | None = None
    block_size: int = 10
    images_per_call: int = 128

    @property
    def sampling(self) -> Sampling:
        """As one object.

        Raises:
            ValueError: for options of NOpt beside another method, and what [`from_flat`] refuses.
        """
        shared = {name: getattr(self, name) for name in ("guidance_scale", "num_inference_steps", "eta", "batch_size")}
        names = [] if str(self.method).lstrip().startswith("{") else self.method.split("+")
        if "nopt" in names:
            own = from_flat({name: getattr(self, name) for name in FLAT if hasattr(self, name)})["method"]
            parts = tuple(own if name == "nopt" else SamplingMethod.of(name) for name in names)
            return Sampling.of(method=Combined(parts) if len(parts) > 1 else own, **shared)
        changed = [f.name for f in dataclasses.fields(self) if f.name in FLAT and getattr(self, f.name) != f.default]
        if changed:
            raise ValueError(
                f"{changed} are of 'nopt', and `method` is {self.method!r}: leave them out, and give a method its own "
                "fields, `{name: ..., field: value}`."
            )
        return Sampling.of(method=SamplingMethod.of(self.method), **shared)
