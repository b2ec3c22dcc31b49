// What partition types are called, for people; nothing depends on it.

enum PartitionTypes {
    /// Types of MBR entries.
    static let names: [UInt8: String] = [
        0x01: "FAT12", 0x04: "FAT16 (up to 32 MiB)", 0x05: "Extended", 0x06: "FAT16", 0x07: "NTFS, exFAT or HPFS",
        0x0B: "FAT32", 0x0C: "FAT32 (LBA)", 0x0E: "FAT16 (LBA)", 0x0F: "Extended (LBA)", 0x11: "Hidden FAT12",
        0x27: "Windows recovery", 0x42: "Windows dynamic disk", 0x82: "Linux swap", 0x83: "Linux",
        0x85: "Linux extended", 0x8E: "Linux LVM", 0xA5: "FreeBSD", 0xA6: "OpenBSD", 0xA9: "NetBSD", 0xAF: "HFS",
        0xEE: "GPT protective", 0xEF: "EFI system", 0xFB: "VMware VMFS", 0xFC: "VMware core dump",
        0xFD: "Linux RAID",
    ]

    /// Types of GPT entries.
    static let guidNames: [String: String] = [
        "C12A7328-F81F-11D2-BA4B-00A0C93EC93B": "EFI system",
        "21686148-6449-6E6F-744E-656564454649": "BIOS boot",
        "0FC63DAF-8483-4772-8E79-3D69D8477DE4": "Linux",
        "0657FD6D-A4AB-43C4-84E5-0933C84B4F4F": "Linux swap",
        "E6D6D379-F507-44C2-A23C-238F2A3DF928": "Linux LVM",
        "A19D880F-05FC-4D3B-A006-743F0F84911E": "Linux RAID",
        "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709": "Linux root (x86-64)",
        "BC13C2FF-59E6-4262-A352-B275FD6F7172": "Linux extended boot",
        "933AC7E1-2EB4-4F13-B844-0E14E2AEF915": "Linux home",
        "CA7D7CCB-63ED-4C53-861C-1742536059CC": "Linux LUKS",
        "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7": "Microsoft basic data",
        "E3C9E316-0B5C-4DB8-817D-F92DF00215AE": "Microsoft reserved",
        "DE94BBA4-06D1-4D40-A16A-BFD50179D6AC": "Windows recovery",
        "5808C8AA-7E8F-42E0-85D2-E1E90434CFB3": "Windows dynamic disk metadata",
        "AF9B60A0-1431-4F62-BC68-3311714A69AD": "Windows dynamic disk data",
        "AA31E02A-400F-11DB-9590-000C2911D1B8": "VMware VMFS",
        "9D275380-40AD-11DB-BF97-000C2911D1B8": "VMware core dump",
        "381CFCCC-7288-11E0-92EE-000C2911D0B2": "VMware vSAN",
        "48465300-0000-11AA-AA11-00306543ECAC": "Apple HFS+",
        "7C3457EF-0000-11AA-AA11-00306543ECAC": "Apple APFS",
        "516E7CB6-6ECF-11D6-8FF8-00022D71712B": "FreeBSD ZFS",
    ]
}
