"""`poprisk report`: one page about one or more runs, made from their own text logs.

    run_files           which files of a directory belong to the run
    read_json, stop_file, trainer_state, metrics_csv, labels, settings    one source each
    run                 all of a run's sources together
    curve, key_names    logged numbers over steps, and what their names mean
    chart               what a chart shows, and the same in words
    loss_charts, stop_charts, gate_charts, preference_charts, other_charts    which charts there are
    findings            what happened, in sentences and key figures
    palette, draw, svg  a chart as picture: PNG, or SVG that follows the page's colours
    html_tree, page_style, page    the page

Pickles are never read: no `training_args.bin`, no checkpoint. Nothing is imported here; only
`draw` and `svg` need matplotlib.
"""
