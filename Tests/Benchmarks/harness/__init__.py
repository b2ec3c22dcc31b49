"""The parts of Scripts/bench: servers, test disks, measuring, cases, report."""
