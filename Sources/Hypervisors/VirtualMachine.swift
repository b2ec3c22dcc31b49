// What a hypervisor tells of a virtual machine: its disks, whether they can be backed up, its configuration.
public import Block
public import Transports

/// A virtual machine as its hypervisor describes it.
public struct VirtualMachine: Sendable {
    /// What stays when the machine is renamed: a UUID where the hypervisor has one.
    public var id: String
    /// Its name to people.
    public var name: String
    /// Whether it runs.
    public var isRunning: Bool
    /// Whether an agent in the guest answers, so that its file systems can be frozen.
    public var hasGuestAgent: Bool
    /// Whether somebody runs it who could freeze its file systems and track its changes. Where nobody does, nobody
    /// expects it.
    public var hasHypervisor = true
    /// All disks, also those that cannot be backed up.
    public var disks: [VirtualDisk]
    /// What is needed to define the machine again, kept with each restore point.
    public var documents: [ConfigurationDocument]

    /// A machine without disks yet.
    public init(id: String, name: String, isRunning: Bool) {
        self.id = id
        self.name = name
        self.isRunning = isRunning
        hasGuestAgent = false
        disks = []
        documents = []
    }
}

/// A disk of a virtual machine.
public struct VirtualDisk: Sendable {
    /// What the hypervisor calls it within the machine (vda, disk0): stable from run to run.
    public var id: String
    /// Bytes on the disk.
    public var size: UInt64
    /// What it is to people: the image's path, or whatever the hypervisor says.
    public var name: String
    /// The format of its image, as the hypervisor names it.
    public var format: String
    /// Names of checkpoints since which changes are known, usable ones only.
    public var checkpoints: [String] = []
    /// Why it cannot be backed up; nil when it can.
    public var obstacle: String?
    /// Why a run in which it takes part fails; nil where nothing is known to be wrong.
    public var failure: BlockError?
    /// The transport that it is read over, and why not over those that were wanted more; nil where that is not chosen
    /// here.
    public var choice: TransportChoice?
    /// Why only full backups of it are possible; nil when changes can be tracked.
    public var trackingObstacle: String?

    /// A disk that can be backed up, with changes tracked.
    public init(id: String, size: UInt64, name: String, format: String) {
        self.id = id
        self.size = size
        self.name = name
        self.format = format
    }
}

/// A document that describes a machine or a part of it.
public struct ConfigurationDocument: Sendable {
    /// A plain file name: domain.xml, nvram.fd.
    public var name: String
    /// The content.
    public var content: [UInt8]

    /// A document.
    public init(name: String, content: [UInt8]) {
        self.name = name
        self.content = content
    }
}
