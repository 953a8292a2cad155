"""Known-truth tissue: genes -> programmes -> nuclei (``tissue``), H&E (``rendering``), counts (``expression``)."""
