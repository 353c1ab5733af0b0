"""Tool calls in chat completions: the formats checkpoints speak, the grammar that keeps them, the parser."""

from trimtab.serving.tools.answer import Delta, Parsed, ToolCall
from trimtab.serving.tools.formats import FORMATS, NAMES, ToolFormat, template_source
from trimtab.serving.tools.parser import ToolParser
from trimtab.serving.tools.plan import ToolPlan, prepare

__all__ = [
    "FORMATS",
    "NAMES",
    "Delta",
    "Parsed",
    "ToolCall",
    "ToolFormat",
    "ToolParser",
    "ToolPlan",
    "prepare",
    "template_source",
]
