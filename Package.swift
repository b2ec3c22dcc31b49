// swift-tools-version: 6.2
import PackageDescription

/// One set of settings for every Swift target. `_GNU_SOURCE` is forwarded to the C importer, so that the Glibc module
/// shows the Linux calls (preadv2, O_DIRECT, SEEK_DATA, ...) and agrees with the C targets about its structures.
/// DISKGATE_STRICT=1 (set by Scripts/test) makes warnings errors; a user's newer compiler may know new ones.
let settings: [SwiftSetting] =
    [
        .enableUpcomingFeature("ExistentialAny"),
        .enableUpcomingFeature("InternalImportsByDefault"),
        .enableUpcomingFeature("MemberImportVisibility"),
    ] + (Context.environment["DISKGATE_STRICT"] == "1" ? [.treatAllWarnings(as: .error)] : [])

let gnuSource: [CSetting] = [.define("_GNU_SOURCE")]

let package = Package(
    name: "diskgate-package",
    products: [
        .executable(name: "diskgate", targets: ["diskgate"]),
        // For Tests/Fuzz, a package of its own.
        .library(name: "Backup", targets: ["Backup"]),
        .library(name: "Block", targets: ["Block"]),
        .library(name: "LinuxIO", targets: ["LinuxIO"]),
        .library(name: "Formats", targets: ["Formats"]),
        .library(name: "Hypervisors", targets: ["Hypervisors"]),
        .library(name: "NBD", targets: ["NBD"]),
        .library(name: "Transports", targets: ["Transports"]),
    ],
    dependencies: [
        .package(url: "https://github.com/apple/swift-argument-parser", from: "1.8.0"),
        .package(url: "https://github.com/apple/swift-log", from: "1.16.0"),
    ],
    targets: [
        .systemLibrary(name: "CZstd", pkgConfig: "libzstd", providers: [.apt(["libzstd-dev"])]),
        .systemLibrary(name: "CXXHash", pkgConfig: "libxxhash", providers: [.apt(["libxxhash-dev"])]),
        .systemLibrary(name: "CSQLite", pkgConfig: "sqlite3", providers: [.apt(["libsqlite3-dev"])]),
        .systemLibrary(name: "CZlib", pkgConfig: "zlib", providers: [.apt(["zlib1g-dev"])]),
        .target(name: "CLinux", cSettings: gnuSource, linkerSettings: [.linkedLibrary("uring")]),
        // Only OpenSSL's headers are needed to build; the library is loaded when TLS is used.
        .target(name: "COpenSSL", cSettings: gnuSource, linkerSettings: [.linkedLibrary("dl")]),
        // Nothing of libiscsi is needed to build; the library is loaded when an iscsi: source is opened.
        .target(name: "CISCSI", cSettings: gnuSource, linkerSettings: [.linkedLibrary("dl")]),
        .target(name: "Block", cSettings: gnuSource, swiftSettings: settings),
        .target(name: "LinuxIO", dependencies: ["Block", "CLinux"], cSettings: gnuSource, swiftSettings: settings),
        .target(
            name: "Formats", dependencies: ["Block", "LinuxIO", "CZstd", "CZlib"], cSettings: gnuSource,
            swiftSettings: settings),
        .target(
            name: "NBD",
            dependencies: ["Block", "LinuxIO", "CLinux", "COpenSSL", .product(name: "Logging", package: "swift-log")],
            cSettings: gnuSource, swiftSettings: settings),
        .target(
            name: "Transports", dependencies: ["Block", "CISCSI", "CLinux", "LinuxIO", "Formats", "NBD"],
            cSettings: gnuSource, swiftSettings: settings),
        .target(
            name: "Hypervisors",
            dependencies: [
                "Block", "CLinux", "LinuxIO", "NBD", "Transports", .product(name: "Logging", package: "swift-log"),
            ], cSettings: gnuSource, swiftSettings: settings),
        .target(
            name: "Backup",
            dependencies: [
                "Block", "CLinux", "CSQLite", "CXXHash", "CZstd", "LinuxIO", "Formats", "NBD", "Transports",
                "Hypervisors", .product(name: "Logging", package: "swift-log"),
            ], cSettings: gnuSource, swiftSettings: settings),
        .target(
            name: "Gateway",
            dependencies: [
                "Backup", "Block", "CLinux", "Formats", "LinuxIO", "NBD", "Transports",
                .product(name: "Logging", package: "swift-log"),
            ], cSettings: gnuSource, swiftSettings: settings),
        .executableTarget(
            name: "diskgate",
            dependencies: [
                "Backup", "Block", "Formats", "Gateway", "Hypervisors", "LinuxIO", "NBD", "Transports",
                .product(name: "Logging", package: "swift-log"),
                .product(name: "ArgumentParser", package: "swift-argument-parser"),
            ],
            cSettings: gnuSource, swiftSettings: settings),
        .testTarget(
            name: "FormatsTests", dependencies: ["Block", "LinuxIO", "Formats", "Support", "CZlib", "CZstd"],
            cSettings: gnuSource, swiftSettings: settings),
        .target(
            name: "Support", dependencies: ["Block", "LinuxIO"], path: "Tests/Support", cSettings: gnuSource,
            swiftSettings: settings),
        .testTarget(
            name: "BlockTests", dependencies: ["Block", "LinuxIO", "Support"], cSettings: gnuSource,
            swiftSettings: settings),
        .testTarget(
            name: "NBDTests",
            dependencies: [
                "Backup", "Block", "CLinux", "LinuxIO", "NBD", "Support",
                .product(name: "Logging", package: "swift-log"),
            ],
            cSettings: gnuSource, swiftSettings: settings),
        .testTarget(
            name: "LinuxIOTests", dependencies: ["Block", "CLinux", "LinuxIO", "Support"], cSettings: gnuSource,
            swiftSettings: settings),
        .testTarget(
            name: "TransportsTests", dependencies: ["Block", "Formats", "LinuxIO", "Support", "Transports"],
            cSettings: gnuSource,
            swiftSettings: settings),
        .testTarget(
            name: "BackupTests",
            dependencies: [
                "Backup", "Block", "Formats", "Hypervisors", "LinuxIO", "NBD", "Support", "Transports",
            ], cSettings: gnuSource, swiftSettings: settings),
        .testTarget(
            name: "HypervisorsTests",
            dependencies: ["Block", "CLinux", "LinuxIO", "Hypervisors", "NBD", "Support", "Transports"],
            cSettings: gnuSource,
            swiftSettings: settings),
        .testTarget(name: "TidyTests", cSettings: gnuSource, swiftSettings: settings),
        .testTarget(
            name: "EndToEnd", dependencies: ["CLinux"], cSettings: gnuSource, swiftSettings: settings),
    ],
    swiftLanguageModes: [.v6]
)
