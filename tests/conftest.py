"""What all tests share: Hypothesis runs under its "ci" profile; HYPOTHESIS_PROFILE chooses another one."""

import os

from hypothesis import settings

# No deadline: a shared runner pauses as it likes. Not derandomized: each run is to try something new.
settings.register_profile("ci", deadline=None, derandomize=False, max_examples=150, print_blob=True)
settings.register_profile("thorough", settings.get_profile("ci"), max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
