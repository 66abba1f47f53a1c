"""What ``--help`` shows under the options: lines to copy."""

OF_ALL = """\
example: prune half of the weights of a ResNet-18 by magnitude, without data
  torch-flowprune prune resnet18 --sparsity 0.5 --out pruned.safetensors
remove half of its FLOPs, by a measure that reads a folder of images
  torch-flowprune prune resnet18 --method taylor --data images/ --granularity channel \\
      --cost flops --sparsity 0.5 --shrink --out small.safetensors --onnx small.onnx

torch-flowprune COMMAND --help lists the options of a command"""

_PRUNE = """\
half of the weights, by magnitude
  torch-flowprune prune resnet18 --sparsity 0.5 --out pruned.safetensors
two of every four weights, for 2:4 kernels
  torch-flowprune prune resnet18 --granularity 2:4 --out pruned.safetensors
half of the FLOPs, as a smaller model
  torch-flowprune prune resnet18 --granularity channel --cost flops --sparsity 0.5 \\
      --method taylor --data images/ --shrink --out small.safetensors"""

_SCORE = """\
score once, prune several times
  torch-flowprune score resnet18 --method taylor --data images/ --out scores.safetensors
  torch-flowprune prune resnet18 --scores scores.safetensors --sparsity 0.5 --out half.safetensors
  torch-flowprune prune resnet18 --scores scores.safetensors --sparsity 0.8 --out fifth.safetensors"""

_COMPARE = """\
  torch-flowprune compare resnet18 --data images/train --held-out images/val --plot compared.png
  torch-flowprune compare resnet18 --data images/train --granularity channel \\
      --methods magnitude taylor --sparsities 0.1 0.2 0.3"""

_DIAGNOSE = """\
  torch-flowprune diagnose resnet18 --data images/ --plot diagnosed.png
  torch-flowprune diagnose resnet18 --data images/ --method gradient_norm_preservation"""

_PRUNE_CHECKPOINT = """\
a model of transformers, from the Hugging Face hub
  hf download OWNER/NAME --local-dir dense
  torch-flowprune prune-checkpoint dense --sparsity 0.5 --out pruned
  torch-flowprune prune-checkpoint dense --granularity 2:4 --out sparse24"""

_DEMO = """\
  torch-flowprune demo
  torch-flowprune demo --granularity filter --sparsities 0.2 0.5 --methods magnitude taylor"""

EXAMPLES = {
    "demo": _DEMO,
    "prune": _PRUNE,
    "score": _SCORE,
    "compare": _COMPARE,
    "diagnose": _DIAGNOSE,
    "prune-checkpoint": _PRUNE_CHECKPOINT,
}
"""By command."""
