"""`poprisk demo`: DPO on preferences with wrong labels, on a real but very small language model.

    settings            every number of the job, full and quick
    corpus              the text of Python's language reference, cut into windows
    tokenizer           a BPE tokenizer trained on it
    language_model      a 1M-parameter Llama, supervised fine-tuning
    preference_pairs    human continuation against the model's own sample, swapped labels
    pair_scores         log-ratios policy / reference per pair
    metrics             accuracy, share fitted, drift, paired standard errors
    dpo_runs            one DPO run with its trajectory and the recorded stop
    job                 all phases in order -> results
    findings            what the results say, in sentences
    table, figure, output_files, progress, quiet    what the user sees

Nothing is imported here: every module but `settings`, `metrics`, `findings` and `output_files`
needs the `[demo]` extra.
"""
