// A sysfs that a test makes: disks of VMware's and others' adapters that this machine does not have.
import Block
import Glibc
import LinuxIO

/// A tree of files and links as sysfs has them.
public struct FakeSystem {
    /// Where it is.
    public let directory: TemporaryDirectory
    /// Where sysfs is in it.
    public var sysfs: String { directory.path }

    /// An empty tree in a directory.
    public init(directory: TemporaryDirectory) { self.directory = directory }

    /// Writes a file, and makes the directories above it.
    public func write(_ path: String, _ bytes: [UInt8]) throws {
        try makeDirectories("\(sysfs)/\(directoryName(path))")
        _ = try directory.makeFile(path, bytes)
    }

    /// Writes a file of one line.
    public func write(_ path: String, _ text: String) throws { try write(path, Array("\(text)\n".utf8)) }

    /// Makes a link to a directory, which is made.
    public func link(_ path: String, to target: String) throws {
        try makeDirectories("\(sysfs)/\(directoryName(path))")
        try makeDirectories("\(sysfs)/\(target)")
        try require(symlink("\(sysfs)/\(target)", "\(sysfs)/\(path)") == 0, "linking \(path)")
    }

    /// A SCSI disk behind a host adapter at a place on the PCI bus.
    public func addDisk(_ name: String, _ address: String, bus: String, driver: String, sectors: Int, minor: Int) throws
    {
        let host = address.prefix { $0 != ":" }
        let device = "devices/pci0000:00/\(bus)/host\(host)/target\(host):0:0/\(address)"
        try makeDirectories("\(sysfs)/\(device)/block/\(name)/queue")
        try link("block/\(name)", to: "\(device)/block/\(name)")
        try link("\(device)/block/\(name)/device", to: device)
        try write("class/scsi_host/host\(host)/proc_name", driver)
        try write("block/\(name)/size", "\(sectors)")
        try write("block/\(name)/dev", "8:\(minor)")
        try write("block/\(name)/ro", "0")
        try write("block/\(name)/diskseq", "\(minor + 7)")
        try write("block/\(name)/queue/logical_block_size", "512")
        try write("block/\(name)/device/state", "running")
    }
}
