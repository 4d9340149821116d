"""`grafter report`: what a run or a comparison found, as one HTML page that needs nothing else.

    a run's files, or a comparison       ->  run_files, or grafter.compare
    what they say                        ->  PageData, one frozen model for every kind of page
    tensors that were dumped             ->  pictures: heatmaps and histograms of bounded size
    page                                 ->  HTML: the data as JSON, drawn by the script of the page

Nothing that a run left behind is trusted: a damaged file is a finding on the page, a name with HTML in it stays text.
"""
