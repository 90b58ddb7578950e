"""Speed and memory of a whole decoder, as README reports them: `minikv bench`, `minikv long` and `minikv capacity`, the
most important first. Each cell is printed as it is measured, and the files are written after each.

python benchmarks/end_to_end.py bench --cases 1x128k --methods dense,default,minikv --rows 1 --steps 48 \
    --json benchmarks/results/one_row.json
python benchmarks/end_to_end.py bench --cases 16x32k --methods dense,default,minikv --rows 1 --steps 48 \
    --json benchmarks/results/end_to_end.json
python benchmarks/end_to_end.py bench --cases 1x64k --methods dense,minikv,default --inner eager --steps 4 --rows 1 \
    --json benchmarks/results/prompts.json
python benchmarks/end_to_end.py bench --cases 1x1k+2k+4k+8k --methods dense,default,minikv --steps 32 \
    --json benchmarks/results/short.json
python benchmarks/end_to_end.py bench --cases 1x8k --methods dense,default@dynamic,transformers,static --steps 32 \
    --json benchmarks/results/dynamic.json
python benchmarks/end_to_end.py bench --cases 1x32k --methods dense,default,minikv,quanto,kvpress-pyramidkv:ratio=0.85,\
kvpress-snapkv:ratio=0.85 --steps 16 --rows 1 --json benchmarks/results/peers.json
python benchmarks/end_to_end.py long --tokens 20000 --batch 4 --prompt 4k --every 2000 --methods default,default@dynamic \
    --json benchmarks/results/long.json
python benchmarks/end_to_end.py capacity --methods dense,default --memory 24GB --prompt 32k --probes 2 \
    --json benchmarks/results/capacity.json
"""

import sys

from minikv_compile.cli import app

if __name__ == "__main__":
    app(sys.argv[1:])
