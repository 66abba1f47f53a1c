"""What a run of pytest sets, for tests and doctests alike."""

import importlib.util
import os
from pathlib import Path

from hypothesis import Phase, settings

# No deadlines: a busy machine is not a fault. In CI the examples are the same in every run, and more of them.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=200, print_blob=True)
# Once a mutant: fewer examples, and the first that fails will do.
settings.register_profile(
    "mutation", deadline=None, derandomize=True, max_examples=30, phases=(Phase.explicit, Phase.generate), database=None
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "local"))

# An integration is imported with its framework alone.
_integrations = Path(__file__).parent / "torch_flowprune" / "integrations"
collect_ignore = [
    str(path)
    for path in _integrations.glob("*.py")
    if not path.stem.startswith("_") and importlib.util.find_spec(path.stem) is None
]
