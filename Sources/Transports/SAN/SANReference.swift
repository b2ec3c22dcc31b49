// san: sources taken apart: a LUN that this proxy sees, or a file of a datastore that lies on such LUNs.
public import Block
public import LinuxIO

/// What `san:` names.
public enum SANReference: Sendable, Equatable {
    /// A whole LUN: `wwn=W`, `serial=S` or `hctl=H:C:T:L`.
    case unit(DiskSelector)
    /// `DATASTORE/PATH`: a file, or a directory to be listed; the path is empty for the datastore itself, and the
    /// datastore's name for all of them.
    case file(datastore: String, path: String)
}

extension SourceReference {
    /// Takes what stands behind `san:` apart.
    ///
    /// - Throws: `.invalid` for a malformed reference.
    static func san(_ key: Substring, _ value: String?, body: String, of text: String) throws(BlockError)
        -> SANReference
    {
        if let selector = try diskSelector(key, value, of: text) { return .unit(selector) }
        let parts = body.split(separator: "/", maxSplits: 1, omittingEmptySubsequences: false).map(String.init)
        return .file(datastore: parts[0], path: parts.count == 2 ? parts[1] : "")
    }

    /// What picks a disk out: serial=S, wwn=W or hctl=H:C:T:L, with or without hotadd: before it.
    ///
    /// - Throws: `.invalid` for anything else.
    public static func disk(_ text: String) throws(BlockError) -> DiskSelector {
        let parts = (text.after("hotadd:") ?? text[...]).split(separator: "=", maxSplits: 1)
        if parts.count == 2, let disk = try diskSelector(parts[0], String(parts[1]), of: text) { return disk }
        throw BlockError(
            .invalid, "\(text) names no disk: write /dev/NODE, serial=SERIAL, wwn=NAME or hctl=HOST:CHANNEL:TARGET:UNIT"
        )
    }

    /// A disk picked out by `serial=`, `wwn=` or `hctl=`; nil where the key is another.
    ///
    /// - Throws: `.invalid` for one of these keys with a value that it cannot have.
    static func diskSelector(_ key: Substring, _ value: String?, of text: String) throws(BlockError) -> DiskSelector? {
        guard let value else { return nil }
        switch (key.lowercased(), value.isEmpty) {
        case ("serial", false): return .serial(value)
        case ("wwn", false): return .name(value)
        case ("hctl", false): if let address = SCSIAddress(value) { return .address(address) }
        case ("serial", true), ("wwn", true), ("hctl", true): break
        default: return nil
        }
        throw BlockError(
            .invalid,
            "opening \(text): write serial=SERIAL, wwn=NAME or hctl=HOST:CHANNEL:TARGET:UNIT behind the colon "
                + "(diskgate disks shows them)")
    }
}
