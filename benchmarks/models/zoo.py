"""Models of every family that timm, torchvision and transformers give.

Small, briefly trained, with data that they accept.
"""

from __future__ import annotations

import importlib
import random
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision import models
from tqdm import tqdm

from torch_flowprune.inputs.data.batches import inputs_of
from torch_flowprune.inputs.data.objective import Objective, call

CLASSES = 10
SIZES = (64, 96, 128, 192, 224, 256)
"""Image sizes tried, smallest first; None, the model's own, comes last."""
LARGE = 40_000_000
"""Above this many parameters a transformer is built two blocks deep."""
KNOWN_HARD = (
    "eva02_tiny_patch14_224",
    "coatnet_pico_rw_224",
    "mobilenetv3_small_050",
    "vit_tiny_patch16_224",
    "convnext_atto",
    "resnetv2_50x1_bit",
)
"""Models that earlier pruning libraries fail on, or that users name first, where a family's smallest is another."""


@dataclass
class Subject:
    """A dense model with what it takes to run and train it."""

    model: nn.Module
    batches: list[Any]
    objective: Callable[[nn.Module, Any], Tensor]
    mode: str = "eval"
    how: dict[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> Any:
        """What the model is called with, of the first batch."""
        return inputs_of(self.batches[0])


class CannotRun(Exception):
    """The dense model itself does not run forward and backward here."""


# ------------------------------------------------------------------------------------------------- which models


def keys() -> list[str]:
    """``source/family/model`` for every model of the table, the smallest first."""
    found = {**_timm_keys(), **_torchvision_keys(), **{f"transformers/{kind}/{kind}": 0.0 for kind in _TRANSFORMERS}}
    return sorted(found, key=found.__getitem__)


def _timm_keys() -> dict[str, float]:
    found = {}
    for module in tqdm(timm.list_modules(), desc="counting parameters"):
        names = [name for name in timm.list_models(module=module) if not name.startswith("test_")]
        counts = {name: _count(partial(timm.create_model, name)) for name in names}
        for name in {min(counts, key=counts.__getitem__), *KNOWN_HARD} & counts.keys():
            found[f"timm/{module}/{name}"] = counts[name]
    return found


def _torchvision_keys() -> dict[str, float]:
    found: dict[str, list[str]] = {}
    for package in (models, models.detection, models.segmentation, models.video):
        for name in models.list_models(module=package):
            found.setdefault(models.get_model_builder(name).__module__.removeprefix("torchvision.models."), []).append(
                name
            )
    smallest = {module: min(names, key=_torchvision_count) for module, names in found.items()}
    return {f"torchvision/{module}/{name}": float(_torchvision_count(name)) for module, name in smallest.items()}


def _torchvision_count(name: str) -> int:
    return int(next(iter(models.get_model_weights(name))).meta["num_params"])


def _count(build: Callable[[], nn.Module]) -> float:
    """How many parameters, without allocating them."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return sum(parameter.numel() for parameter in build().parameters())
    except (RuntimeError, TypeError, NotImplementedError):
        return float("inf")


# ------------------------------------------------------------------------------------------------- how each is built


def build(key: str) -> Subject:
    """The model of a key, trained for three steps (branches and heads that start at zero then have gradients).

    Raises:
        CannotRun: with the reason, where the dense model itself does not train here.
    """
    source, family, name = key.split("/", 2)
    attempts = {"timm": _timm_attempts, "torchvision": _torchvision_attempts, "transformers": _transformers_attempts}[
        source
    ](name, family)
    reason = "no attempt"
    for attempt in attempts:
        seed(0)
        try:
            subject = attempt()
            _warm_up(subject)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        else:
            return subject
    raise CannotRun(reason)


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)


def _timm_attempts(name: str, _family: str) -> Iterable[Callable[[], Subject]]:
    shallow = {"depth": 2} if _count(partial(timm.create_model, name)) > LARGE else {}
    for size in (*SIZES, None):
        for options in ({"img_size": size, **shallow}, {"img_size": size}, {}):
            if size is None and "img_size" in options:
                continue
            yield partial(_timm_subject, name, size, options)


def _timm_subject(name: str, size: int | None, options: dict[str, Any]) -> Subject:
    model = timm.create_model(name, num_classes=CLASSES, **options)
    size = size or model.pretrained_cfg.get("input_size", (3, 224, 224))[-1]
    return Subject(model, _images(size), Objective(_first_logits), how={"pixels": size, **options})


def _images(size: int, shape: Callable[[int], tuple[int, ...]] = lambda size: (3, size, size)) -> list[Any]:
    targets = torch.arange(4) % CLASSES
    images = torch.randn(4, *shape(size)) + targets.view(4, *[1] * len(shape(size)))
    return [(images[:2], targets[:2]), (images[2:], targets[2:])]


def _first_logits(output: Any, target: Tensor) -> Tensor:
    """Cross-entropy summed over the heads: auxiliary and distilled ones count too."""
    return torch.stack([nn.functional.cross_entropy(logits, target) for logits in tensors(output)]).sum()


def _torchvision_attempts(name: str, family: str) -> Iterable[Callable[[], Subject]]:
    for size in (*SIZES, 299, 320):
        yield partial(_torchvision_subject, name, family, size)


def _torchvision_model(name: str, family: str, size: int = 64) -> nn.Module:
    options: dict[str, Any] = {"weights": None, "num_classes": CLASSES}
    if family.startswith(("detection", "segmentation")):
        options["weights_backbone"] = None
    if family.startswith("detection") and "ssd" not in name:
        options |= {"min_size": size, "max_size": size}
    if family in ("vision_transformer", "maxvit") and size > 64:
        options |= {"image_size": size} if family == "vision_transformer" else {"input_size": (size, size)}
    return models.get_model(name, **options)


def _torchvision_subject(name: str, family: str, size: int) -> Subject:
    model = _torchvision_model(name, family, size)
    how = {"pixels": size}
    if family.startswith("detection"):
        return Subject(model, [_boxes(size, keypoints="keypoint" in name)], _sum_of_losses, "train", how)
    if family.startswith("segmentation"):
        images = torch.randn(2, 3, size, size)
        return Subject(model, [(images, torch.randint(CLASSES, (2, size, size)))], Objective(_first_logits), how=how)
    if family.startswith("video"):
        return Subject(model, _images(size, lambda size: (3, 16, size, size)), Objective(_first_logits), how=how)
    return Subject(model, _images(size), Objective(_first_logits), how=how)


def _boxes(size: int, *, keypoints: bool) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    quarter = size / 4
    boxes = torch.tensor([[quarter, quarter, 3 * quarter, 3 * quarter], [0, 0, 2 * quarter, 2 * quarter]])
    masks = torch.zeros(2, size, size, dtype=torch.uint8)
    masks[:, size // 4 : size // 2, size // 4 : size // 2] = 1
    target = {"boxes": boxes, "labels": torch.tensor([1, 2 if not keypoints else 1]), "masks": masks}
    if keypoints:
        target["keypoints"] = torch.cat([torch.rand(2, 17, 2) * quarter + quarter, torch.ones(2, 17, 1)], dim=-1)
    return [torch.rand(3, size, size) for _ in range(2)], [target, target]


def _sum_of_losses(model: nn.Module, batch: Any) -> Tensor:
    """Torchvision's detectors return a dict of losses in train mode."""
    return torch.stack([loss.mean() for loss in model(*batch).values()]).sum()


_TRANSFORMERS = {
    "bert": (
        "BertConfig",
        "BertForMaskedLM",
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
    "llama": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 128,
        },
    ),
}


_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
MORE_TRANSFORMERS = {
    "albert": ("AlbertConfig", "AlbertForMaskedLM", {**_SIZES, "embedding_size": 16}),
    "bloom": ("BloomConfig", "BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "deberta-v2": ("DebertaV2Config", "DebertaV2ForMaskedLM", {**_SIZES, "relative_attention": True}),
    "distilbert": ("DistilBertConfig", "DistilBertForMaskedLM", {"dim": 32, "n_layers": 2, "n_heads": 4}),
    "electra": ("ElectraConfig", "ElectraForMaskedLM", {**_SIZES, "embedding_size": 16}),
    "falcon": ("FalconConfig", "FalconForCausalLM", {**_SIZES}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**_SIZES, "num_key_value_heads": 2, "head_dim": 8}),
    "gpt-neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**_SIZES}),
    "mamba": ("MambaConfig", "MambaForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**_SIZES, "num_key_value_heads": 2, "num_local_experts": 4}),
    "opt": ("OPTConfig", "OPTForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                                            "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "phi": ("PhiConfig", "PhiForCausalLM", {**_SIZES}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**_SIZES, "num_key_value_heads": 2}),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", {**_SIZES}),
}  # fmt: skip
"""Beyond those of the table of families: looked at for their operators."""


def _transformers_attempts(name: str, _family: str) -> Iterable[Callable[[], Subject]]:
    yield partial(_transformers_subject, name)


def _transformers_subject(name: str) -> Subject:
    library = importlib.import_module("transformers")
    config_name, model_name, options = {**_TRANSFORMERS, **MORE_TRANSFORMERS}[name]
    config = getattr(library, config_name)(vocab_size=200, **options)
    config.pad_token_id = config.pad_token_id if (config.pad_token_id or 0) < 200 else 0
    model = getattr(library, model_name)(config)
    tokens = [torch.randint(3, 200, (2, 12)) for _ in range(2)]  # below are those of padding
    return Subject(model, [{"input_ids": ids, "labels": ids} for ids in tokens], Objective(), how={"tokens": 12})


# ------------------------------------------------------------------------------------------------- running them


def tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of any output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return [tensor for part in output for tensor in tensors(part)]
    return []


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """What the model gives in eval mode; by way of train mode, since some models cache weights in eval mode."""
    seed(1)
    model.train()
    model.eval()
    with torch.no_grad():
        if isinstance(inputs, list):  # torchvision's detectors take a list of images
            return tensors(model(inputs))
        return tensors(call(model, inputs))


def gradients(subject: Subject, model: nn.Module, step: int) -> tuple[Tensor, list[Tensor | None]]:
    """The loss and every parameter's gradient in train mode, randomness seeded."""
    seed(step)
    model.train()
    model.zero_grad()
    loss = subject.objective(model, _whole(subject.batches))
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()]


def _whole(batches: list[Any]) -> Any:
    """The batches as one: train-mode batch norm needs more than two samples to have a gradient."""
    if len(batches) == 1:
        return batches[0]
    if isinstance(batches[0], dict):
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


def _warm_up(subject: Subject) -> None:
    """Three steps, then batch-norm statistics of the data, so that the eval mode is well scaled."""
    optimizer = torch.optim.Adam(subject.model.parameters(), lr=1e-3)
    for step in range(3):
        loss, _ = gradients(subject, subject.model, step)
        if not loss.isfinite():
            raise ValueError(f"the loss of the dense model is {loss.item()} after {step} steps")
        optimizer.step()
    norms = [
        module
        for module in subject.model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is not None
    ]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    gradients(subject, subject.model, 3)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    subject.model.zero_grad()
    if not all(output.isfinite().all() for output in outputs(subject.model, subject.inputs)):
        raise ValueError("the dense model's output is not finite in eval mode")
