"""Models from files that others wrote."""

from onepeace_fast.models.load_report import LoadReport
from onepeace_fast.pretrained.load import from_pretrained

__all__ = ["LoadReport", "from_pretrained"]
