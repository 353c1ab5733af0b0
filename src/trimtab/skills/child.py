"""The child of `execute.py`: reads a job, limits itself, runs the function, writes the results.

It runs as a bare script, so it imports nothing of the package. Messages are explained in `execute.py`.
"""

import os
import resource
import sys


def limit(limits):
    for which, most in (
        (resource.RLIMIT_AS, limits["memory"]),
        (resource.RLIMIT_CPU, limits["cpu"]),
        (resource.RLIMIT_FSIZE, limits["file"]),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        # The hard limit leaves a second of CPU time, so that the soft one's signal names the reason.
        ceiling = most + 1 if which == resource.RLIMIT_CPU else most
        _, allowed = resource.getrlimit(which)
        if allowed != resource.RLIM_INFINITY:
            most, ceiling = min(most, allowed), min(ceiling, allowed)
        resource.setrlimit(which, (most, ceiling))


def main():
    job = eval(sys.stdin.read())  # a literal that the parent wrote
    answer = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    try:
        limit(job["limits"])
    except (OSError, ValueError):
        results = "unavailable"
    else:
        results = run(job["code"], job["function"], job["arguments"])
    os.write(answer, (job["mark"] + results).encode())
    os._exit(0)  # whatever the code left behind (threads, exit handlers) has no say any more


def run(code, function, arguments):
    space: dict = {"__name__": "answer"}
    try:
        exec(compile(code, "answer", "exec"), space)
        return "\n".join(ascii(space[function](*each)) for each in arguments)
    except BaseException:  # also SystemExit and MemoryError: any of them fails the answer
        return "error"


if __name__ == "__main__":
    main()
