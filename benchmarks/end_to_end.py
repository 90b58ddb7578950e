"""Speed and memory of a whole decoder, as README reports them: `minikv bench`.

python benchmarks/end_to_end.py --cases 1x131072,16x32768 --json benchmarks/results/end_to_end.json
"""

import sys

from minikv_compile.cli import app

if __name__ == "__main__":
    app(["bench", *sys.argv[1:]])
