// Meta contexts of an export: their names, and which of them a client's queries mean.
public import Block

/// A meta context that an export offers (NBD protocol, "Metadata querying").
public struct MetaContext: Sendable, Equatable {
    /// The full name, for example "base:allocation".
    public let name: String
    /// What it tells.
    public let context: StatusContext

    /// A meta context.
    public init(name: String, context: StatusContext) {
        self.name = name
        self.context = context
    }

    /// What the names of dirty bitmaps' contexts begin with.
    public static let dirtyBitmapPrefix = "qemu:dirty-bitmap:"

    /// The most dirty bitmaps of a disk that are offered; an image may hold 65535.
    public static let dirtyBitmapsMax = 256

    /// The contexts that a device has, in the order of their ids: allocation, depth where it has layers, and its
    /// dirty bitmaps (names as QEMU's docs/interop/nbd.txt has them).
    public static func contexts(of info: DeviceInfo) -> [MetaContext] {
        var contexts = [
            MetaContext(name: "base:allocation", context: .allocation),
            MetaContext(name: "qemu:allocation-depth", context: .depth),
        ]
        for (index, name) in info.dirtyBitmaps.prefix(dirtyBitmapsMax).enumerated() {
            contexts.append(MetaContext(name: "qemu:dirty-bitmap:\(name)", context: .dirtyBitmap(index)))
        }
        return contexts
    }

    /// Whether a query of NBD_OPT_LIST_META_CONTEXT means this context: its name, its namespace ("base:", "qemu:"),
    /// or "qemu:dirty-bitmap:" for every bitmap.
    public func isListed(by query: String) -> Bool {
        if query == name { return true }
        guard query.utf8.last == UInt8(ascii: ":") else { return false }
        return query == "qemu:dirty-bitmap:" ? name.hasPrefix(query) : name.prefix { $0 != ":" } + ":" == query
    }
}
