"""The bench: what the head costs beside what people use today. `python -m bench --help`; docs/performance.md."""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "examples"))  # the demo and the bench share the plain head and the count of memory
