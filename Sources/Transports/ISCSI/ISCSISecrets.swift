// Who we are to an iSCSI target: names and passwords, read once, and given to each new session.
import Block
import CISCSI

/// Names and passwords of an iSCSI source.
struct ISCSISecrets: Sendable {
    private let reference: ISCSIReference
    private let initiator: String
    private let password: String?
    private let targetPassword: String?

    /// Reads the passwords.
    ///
    /// - Throws: as `ISCSIReference.password`.
    init(_ reference: ISCSIReference) throws(BlockError) {
        self.reference = reference
        initiator = reference.initiatorName()
        password = try reference.passwordFile.map { (path) throws(BlockError) in try ISCSIReference.password(path) }
        targetPassword = try reference.targetPasswordFile.map { (path) throws(BlockError) in
            try ISCSIReference.password(path)
        }
    }

    /// A session that is not connected yet.
    ///
    /// - Throws: `.invalid` or `.unsupported` when libiscsi does not take what it is to have.
    func makeSession(_ sessionID: UInt32) throws(BlockError) -> OpaquePointer {
        var options = dg_iscsi_options()
        options.session_id = sessionID
        options.header_digest = reference.hasHeaderDigest
        options.data_digest = reference.hasDataDigest
        var reason: UnsafePointer<CChar>?
        let session = initiator.withCString { initiator in
            options.initiator = initiator
            return reference.target.withCString { target in
                options.target = target
                return withOptional(reference.user) { user in
                    options.user = user
                    return withOptional(password) { password in
                        options.password = password
                        return withOptional(reference.targetUser) { user in
                            options.target_user = user
                            return withOptional(targetPassword) { password in
                                options.target_password = password
                                return dg_iscsi_create(&options, &reason)
                            }
                        }
                    }
                }
            }
        }
        if let session { return session }
        let text = reason.map { String(cString: $0) } ?? "no memory"
        throw BlockError(.unsupported, "opening \(reference): \(text)")
    }
}

private func withOptional<R>(_ text: String?, _ body: (UnsafePointer<CChar>?) -> R) -> R {
    if let text { return text.withCString { body($0) } }
    return body(nil)
}
