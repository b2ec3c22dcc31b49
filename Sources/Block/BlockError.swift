// The one error type of the data plane: what failed, on what, and which kind of failure it is for a client.

/// A failed operation on a block device.
///
/// The kind decides what a client of the export is told (NBD protocol, "Error values"); the message is for people and
/// says what was being done, on what, and what went wrong.
public struct BlockError: Error, Sendable, CustomStringConvertible {
    /// What a caller can do about the failure.
    public enum Kind: UInt8, Sendable, CaseIterable {
        /// The storage below failed to read or write (EIO).
        case inputOutput
        /// No space is left for the data (ENOSPC).
        case noSpace
        /// The device, or the way it was opened, does not allow changes (EPERM).
        case readOnly
        /// The range does not lie inside the device (EINVAL; ENOSPC for writes).
        case outOfRange
        /// The request makes no sense on this device, for example unaligned where alignment is needed (EINVAL).
        case invalid
        /// The device cannot do this, or cannot do it fast (ENOTSUP).
        case unsupported
        /// A limit was reached: too large for one request (EOVERFLOW).
        case tooLarge
        /// Memory could not be had (ENOMEM).
        case noMemory
        /// The device is going away (ESHUTDOWN).
        case shutdown
        /// The bytes of an image contradict its format; reading on could give wrong data (EIO).
        case corrupt
        /// What is being read was changed, moved or deleted by somebody else since it was opened: what would be read
        /// now is not what was opened (EIO).
        case changed
        /// Something that was named does not exist (ENOENT).
        case notFound
        /// The caller may not do this (EACCES).
        case denied
    }

    /// What a caller can do about the failure.
    public let kind: Kind
    /// What was being done, on what, what went wrong.
    public let message: String

    /// An error of a kind with a message for people.
    public init(_ kind: Kind, _ message: String) {
        self.kind = kind
        self.message = message
    }

    /// An error that a system call reported.
    ///
    /// - Parameters:
    ///   - errorNumber: a positive `errno` value.
    ///   - doing: what was being done and on what, for example "reading 4096 bytes at 0 of disk.raw".
    public init(errno errorNumber: Int32, _ doing: String) {
        self.kind = Kind(errno: errorNumber)
        self.message = "\(doing): \(systemErrorText(errorNumber))"
    }

    public var description: String { message }

    /// The same failure with its circumstances put in front.
    public func during(_ doing: String) -> BlockError { BlockError(kind, "\(doing): \(message)") }

    /// The error with what came of it.
    public func followed(by other: BlockError) -> BlockError { BlockError(kind, "\(message) (\(other.message))") }
}
