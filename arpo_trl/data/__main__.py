import sys

from .report import report

if len(sys.argv) < 2:
    sys.exit("usage: python -m arpo_trl.data FILE.parquet …")
print("\n\n".join(report(path) for path in sys.argv[1:]))
