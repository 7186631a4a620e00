"""Where a group's tensors rest between uses: on the device, on the host, in files; and how freed memory is kept."""
