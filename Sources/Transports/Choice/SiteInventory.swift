// The inventory that all commands of this machine go by: where it is, and which of its hosts an address is.
public import Block
import Glibc
import LinuxIO

/// The site's inventory: what DISKGATE_INVENTORY names, else /etc/diskgate/inventory.json where that is there.
public enum SiteInventory {
    /// The variable of the environment that names it. Empty, it says that there is none.
    public static let variable = "DISKGATE_INVENTORY"
    /// Where it is otherwise.
    public static let standardPath = "/etc/diskgate/inventory.json"

    /// What was read last, and of which state of the file.
    private static let known = Locked<(state: String, inventory: Inventory)?>(nil)

    /// Where it is; nil where there is none.
    public static var path: String? {
        if let value = getenv(variable) {
            let path = String(cString: value)
            return path.isEmpty ? nil : path
        }
        // One that cannot even be looked for is not one that is missing.
        if access(standardPath, F_OK) < 0 && (errno == ENOENT || errno == ENOTDIR) { return nil }
        return standardPath
    }

    /// Makes another one that of this process and of those that it starts.
    ///
    /// - Throws: `BlockError` when it cannot be read, or is none.
    public static func use(_ path: String) throws(BlockError) {
        let real = try realPath(path)
        _ = try read(real)
        setenv(variable, real, 1)
    }

    /// The inventory as it is now; nil where there is none.
    ///
    /// - Throws: `BlockError` when it cannot be read, or is none.
    public static func current() throws(BlockError) -> Inventory? {
        guard let path else { return nil }
        do throws(BlockError) { return try read(path) } catch {
            throw BlockError(
                error.kind,
                "\(error.message) (it is the site's inventory; set it right, or name another one with \(variable) or "
                    + "--inventory)")
        }
    }

    /// Reads it, unless the file is the one that was read last.
    private static func read(_ path: String) throws(BlockError) -> Inventory {
        var status = stat()
        if stat(path, &status) < 0 { throw BlockError(errno: errno, "reading the inventory \(path)") }
        let state =
            "\(path) \(status.st_dev):\(status.st_ino) \(status.st_size) \(status.st_mtim.tv_sec)."
            + "\(status.st_mtim.tv_nsec)"
        return try known.withLock { (known) throws(BlockError) in
            if let known, known.state == state { return known.inventory }
            let inventory = try Inventory.read(path)
            known = (state, inventory)
            return inventory
        }
    }
}

extension Inventory {
    /// The host that an address of a source leads to, by its name or one of its addresses, in whatever case. No name
    /// service is asked.
    public func host(at address: String) -> Host? {
        let wanted = Host.place(address)
        return hosts.first { $0.places.contains(wanted) }
    }
}

extension Inventory.Host {
    /// Its name and addresses in the form in which they are compared.
    var places: Set<String> { Set(([name] + (addresses ?? [])).map(Self.place)) }

    /// An address as it is compared: in lower case, without the point behind a full name, IPv6 in its shortest form.
    static func place(_ text: String) -> String {
        var text = text.lowercased()
        if text.first == "[" && text.last == "]" { text = String(text.dropFirst().dropLast()) }
        var address = in6_addr()
        if text.contains(":"), inet_pton(AF_INET6, text, &address) == 1 {
            var short = [CChar](repeating: 0, count: Int(INET6_ADDRSTRLEN))
            if inet_ntop(AF_INET6, &address, &short, socklen_t(short.count)) != nil {
                text = String(decoding: short.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
            }
            if let mapped = text.after("::ffff:"), mapped.contains(".") { text = String(mapped) }
        }
        return text.last == "." ? String(text.dropLast()) : text
    }
}
