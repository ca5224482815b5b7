"""The compiler: from a trained network to a smaller one that computes exactly the same."""

from dnw.compile._compile import CompiledNetwork, Report, ReportRow, compile
from dnw.compile._file import load_program, save_program
from dnw.compile._measure import Timing, measured
from dnw.compile._native import Runtime
from dnw.compile._onnx import save_onnx
from dnw.compile._plan import Plan, PlanRow, plan
from dnw.compile._program import Program
from dnw.compile._standalone import Needs, code_size, save_c

__all__ = [
    "CompiledNetwork",
    "Needs",
    "Plan",
    "PlanRow",
    "Program",
    "Report",
    "ReportRow",
    "Runtime",
    "Timing",
    "code_size",
    "compile",
    "load_program",
    "measured",
    "plan",
    "save_c",
    "save_onnx",
    "save_program",
]
