// swift-tools-version: 6.2
// Fuzzing of everything that parses bytes from outside. A package of its own: libFuzzer and its flags stay out of the
// program. Scripts/fuzz builds and runs it.
import PackageDescription

let settings: [SwiftSetting] = [
    .enableUpcomingFeature("ExistentialAny"),
    .enableUpcomingFeature("InternalImportsByDefault"),
    .enableUpcomingFeature("MemberImportVisibility"),
]

let gnuSource: [CSetting] = [.define("_GNU_SOURCE")]

/// A program that fuzzes one parser.
func fuzzer(_ name: String, _ uses: [String]) -> Target {
    .executableTarget(
        name: name,
        dependencies: ["FuzzSupport"] + (["Block"] + uses).map { .product(name: $0, package: "diskgate-package") },
        cSettings: gnuSource, swiftSettings: settings)
}

let package = Package(
    name: "diskgate-fuzz",
    dependencies: [.package(name: "diskgate-package", path: "../..")],
    targets: [
        .systemLibrary(name: "CFuzzer"),
        .target(
            name: "FuzzSupport",
            dependencies: [
                "CFuzzer", .product(name: "Block", package: "diskgate-package"),
                .product(name: "LinuxIO", package: "diskgate-package"),
                .product(name: "NBD", package: "diskgate-package"),
            ], cSettings: gnuSource, swiftSettings: settings),
        fuzzer("ClientFuzz", ["LinuxIO", "NBD"]),
        fuzzer("DomainFuzz", ["Hypervisors"]),
        fuzzer("InventoryFuzz", ["LinuxIO", "Transports"]),
        fuzzer("JournalFuzz", ["Backup", "LinuxIO"]),
        fuzzer("LedgerFuzz", ["LinuxIO", "Transports"]),
        fuzzer("ManifestFuzz", ["Backup", "LinuxIO"]),
        fuzzer("MonitorFuzz", ["Hypervisors"]),
        fuzzer("OptionsFuzz", ["LinuxIO", "NBD"]),
        fuzzer("PartitionsFuzz", ["Formats"]),
        fuzzer("Qcow2Fuzz", ["Formats", "LinuxIO"]),
        fuzzer("SCSIFuzz", ["LinuxIO"]),
        fuzzer("SidecarFuzz", ["Backup", "LinuxIO"]),
        fuzzer("StartTLSFuzz", ["LinuxIO", "NBD"]),
        fuzzer("TransmissionFuzz", ["LinuxIO", "NBD"]),
        fuzzer("VMDKDescriptorFuzz", ["Formats", "LinuxIO"]),
        fuzzer("VMDKFuzz", ["Formats"]),
        fuzzer("VMFSFuzz", ["Formats"]),
    ],
    swiftLanguageModes: [.v6]
)
