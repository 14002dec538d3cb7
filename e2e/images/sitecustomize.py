"""What Python does first in an engine's processes."""

import gc

# Importing vLLM makes millions of objects that stay. Looking through them again and again for garbage takes 2 of the 8
# processor seconds of each of its two processes, and two cores start some fifty engines here. vLLM itself freezes them
# when it has started.
gc.set_threshold(100_000, 50, 50)
