"""The image encoder and connector as a Core ML package, and the proof that it is one.

Written with coremltools' MIL builder, without torch, on macOS and Linux: ``weights``
are read one by one, ``encoder`` and ``connectors`` compute with them in the vocabulary
of a layout (``nlc``, ``bc1s``), ``package`` saves the program. ``interpreter`` runs a
saved package with numpy and ``check`` compares it with the model, stage by stage;
``backend`` lets a package compute a runtime's image tokens.
"""
