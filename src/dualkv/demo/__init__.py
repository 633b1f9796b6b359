"""The demo: engines as processes, agents replayed closed-loop over real files, in several modes."""
