"""Pictures of tuning records: a self-contained HTML page, and Optuna studies.

`sources` reads rows, `results` sorts them by problem, `charts` places marks, `page` writes HTML;
`study` writes what Optuna's dashboard opens. Nothing here is imported on the way of a call.
"""
