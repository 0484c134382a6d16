"""Fast schedules for kernels: searched by measuring, kept in a folder, put into modules."""

from burnish.backends.tvm.tuning.applying import Applied, apply
from burnish.backends.tvm.tuning.budget import Budget
from burnish.backends.tvm.tuning.database import Database
from burnish.backends.tvm.tuning.search import Progress, Tuned, tune

__all__ = ["Applied", "Budget", "Database", "Progress", "Tuned", "apply", "tune"]
