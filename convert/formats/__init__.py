"""One module per foreign format; a new one is found by lying here.

A format offers ``detect(source)``, ``config(source)`` and ``rules(source)``; see the
README of ``convert/``. A decoder that others build upon also offers ``DEFAULTS``,
``table(model, head)`` and ``decoder_config(values)``, for ``convert/shared/language.py``.
"""
