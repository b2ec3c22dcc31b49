// How test support says that something is wrong: an error whose text is the whole story. It knows no test framework.
public import Block

/// A check that failed.
public struct CheckFailure: Error, CustomStringConvertible {
    /// What was expected, what was found, where.
    public let description: String

    /// A failure with its story.
    public init(_ description: String) { self.description = description }
}

/// Throws the message unless the condition holds. Also for values that cannot be copied, which `#expect` does not take.
public func require(
    _ condition: Bool, _ message: @autoclosure () -> String = "the condition does not hold", line: Int = #line
) throws {
    if !condition { throw CheckFailure("\(message()) (line \(line))") }
}

/// What a device maps of a range into a list of a capacity.
public func mapped(
    _ device: any BlockDevice, _ range: Range<UInt64>, _ patience: Patience = .blocking, capacity: Int = 64
) throws -> (end: UInt64, extents: [Extent]) {
    var list = ExtentList(capacity: capacity)
    let end = try device.map(range, patience, into: &list)
    return (end, (0..<list.count).map { list[$0] })
}

/// What a context of a device says of a range, in a list of a capacity.
public func status(
    _ device: any BlockDevice, _ context: StatusContext, of range: Range<UInt64>, capacity: Int = 64
) throws -> (end: UInt64, extents: [StatusExtent]) {
    var list = StatusList(capacity: capacity)
    let end = try device.status(context, of: range, into: &list)
    return (end, list.extents)
}

/// Throws unless `body` throws a `BlockError` of the kind.
public func requireError(_ kind: BlockError.Kind, _ doing: String, _ body: () throws -> Void) throws {
    do {
        try body()
    } catch let error as BlockError {
        try require(error.kind == kind, "\(doing): expected .\(kind), got .\(error.kind): \(error)")
        return
    }
    throw CheckFailure("\(doing): expected .\(kind), but nothing was thrown")
}
