"""What each command does once its words are parsed: one file a command.

``train``, ``games`` (``pvae train --game``), ``sweep``, ``evaluate``, ``diagnose``, ``doctor``,
``sample``, ``latents`` (``encode``, ``reconstruct``, ``interpolate``, ``traverse``, ``ood``),
``compare``, ``board`` and ``listing`` (``list``). They share ``saying`` (what is said meanwhile),
``programs`` (those that a configuration names) and ``preparing`` (data, processes, threads).

Everything heavy is imported inside the functions, so that ``pvae --help`` answers at once.
"""

__all__ = [
    "board",
    "compare",
    "diagnose",
    "doctor",
    "evaluate",
    "games",
    "latents",
    "listing",
    "preparing",
    "programs",
    "sample",
    "saying",
    "sweep",
    "train",
]
