collect_ignore_glob = ["*"]  # the apps are audited, and never imported here
