"""`grafter report`: one self-contained HTML page that shows what a run or a comparison found.

    a run's files, or a comparison       ->  run_files, or grafter.analysis.compare
    their contents                       ->  PageData, one frozen model for every kind of page
    tensors that were dumped             ->  pictures: heatmaps and histograms of bounded size
    page                                 ->  HTML: the data as JSON, drawn by the script of the page

No file of a run is trusted: a damaged file becomes a finding on the page, and HTML in a name stays text.
"""
