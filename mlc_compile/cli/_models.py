"""From a checkpoint to its model: what `convert_weight` and `gen_config` have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlc_compile.cli._output import Output

if TYPE_CHECKING:
    from mlc_compile.models.spec import Model
    from mlc_compile.models.structure import Detection
    from mlc_compile.weights.checkpoint import Checkpoint


def detect(checkpoint: Checkpoint, model_type: str, out: Output, *, prove: bool) -> Detection:
    """What the checkpoint is, with proofs of the candidates where they are asked for."""
    from mlc_compile.models.structure import identify

    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    where = str(checkpoint.path)
    detection = identify(checkpoint.config, shapes, model_type=model_type, where=where)
    if not prove:
        return detection
    from mlc_compile.runtime import prove as prover

    with out.progress() as progress:
        return prover.prove(detection, checkpoint.config, progress=progress)


def open_model(
    checkpoint: Checkpoint, model_type: str, out: Output, *, prove: bool, allow_experimental: bool
) -> Model:
    """The model of a checkpoint, proved or allowed where its names do not say what it is.

    Raises:
        InputError: there is none, there are several, or it must be proved or allowed.
    """
    from mlc_compile.models.structure import declared_model

    model = declared_model(checkpoint.config, model_type=model_type, where=str(checkpoint.path))
    if model is not None and (model.standing is None or not prove):
        return model  # tensors that do not fit are the converter's to name
    detection = detect(checkpoint, model_type, out, prove=prove)
    model = detection.chosen(allow_experimental=allow_experimental)
    if model.standing is not None:
        out.info(f"{model.arch.name} is {model.label}: {model.standing.evidence}")
    return model
