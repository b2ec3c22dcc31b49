// A site where every transport works for the one disk of the one machine: tests change one fact at a time.
import Block
import Transports

/// What is known of the site, as an administrator writes it.
let siteDocument = """
    {
      "proxy": {
        "id": "vm-7", "name": "proxy-1", "host": "esx1", "datacenter": "east", "manager": "vc1", "power": "on",
        "isEncrypted": false, "datastore": "fast", "maximumDisks": 60, "isProtected": true, "hasDiskUUIDs": true,
        "controllers": [
          {"name": "scsi0", "kind": "lsilogic", "usedUnits": [0]},
          {"name": "scsi1", "kind": "PVSCSI", "units": 64, "usedUnits": []}
        ],
        "luns": ["naa.600a1", "NAA.600A2"], "libraries": ["openssl", "libiscsi", "vddk"]
      },
      "hosts": [
        {"name": "esx1", "kind": "esx", "version": "7.0.3", "manager": "vc1", "transports": ["nbd", "nbdssl"]},
        {"name": "esx2", "kind": "esx", "version": "7.0.3", "manager": "vc1", "isInMaintenance": false}
      ],
      "datastores": [
        {"name": "fast", "type": "vmfs-6", "blockSize": 1048576, "extents": ["naa.600a1", "naa.600a2"],
         "hosts": ["esx1", "esx2"], "isAccessible": true, "mount": "/mnt/fast"},
        {"name": "other", "type": "vmfs5", "blockSize": 1048576, "extents": ["naa.600b1"], "hosts": ["esx2"]}
      ],
      "machines": [
        {"id": "vm-42", "name": "web", "host": "esx1", "datacenter": "east", "manager": "vc1", "power": "on",
         "hasSnapshot": true, "isEncrypted": false,
         "disks": [
           {"key": 2000, "capacity": 42949672960, "file": "[fast] web/web.vmdk", "controller": "pvscsi", "unit": 0,
            "mode": "persistent", "sharing": "none", "busSharing": "none", "rawMapping": "none"}
         ]}
      ]
    }
    """

/// The site, with something changed.
func site(_ change: (inout Inventory) -> Void = { _ in }) throws -> Inventory {
    var site = try Inventory(json: Array(siteDocument.utf8), from: "the site")
    change(&site)
    return site
}

extension Inventory {
    /// The machine, and its first disk.
    var machine: Machine {
        get { machines[0] }
        set { machines[0] = newValue }
    }
    var disk: Disk {
        get { machines[0].disks[0] }
        set { machines[0].disks[0] = newValue }
    }
    /// This proxy, which the site has.
    var own: Proxy {
        get { proxy ?? proxies[0] }
        set { proxy = newValue }
    }
}
