"""`poprisk demo`: DPO on preferences with wrong labels, on a real but very small language model.

    command           options; runs the job behind a progress bar, writes and prints what it found
    settings          every number of the job, full and quick
    corpus            text of Python's language reference -> windows -> preference pairs
    language_model    a 1M-parameter Llama, supervised fine-tuning, samples
    scoring           what a policy has learned: pairs ranked, labels fitted
    runs              four ways to a model, two at a time
    job               all phases in order -> results
    findings          what the results say, in sentences
    progress, show    the bar; what is printed and the picture

Nothing is imported here: every module but `command`, `settings` and `findings` needs the `[demo]`
extra.
"""
