"""`dlo` as `accelerate launch` starts it where DeepSpeed computes on CPUs.

DeepSpeed would compile its own shared memory for CPUs first, for minutes; gloo does without.
"""

import deepspeed.ops

from dlo_export.exporter.cli import main

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
main()
