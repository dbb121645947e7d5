import Foundation

#if canImport(FoundationNetworking)
    import FoundationNetworking
#endif

/// Status and headers of a reply.
struct Head: Sendable {
    let status: Int
    private let fields: [String: String]

    init(status: Int, fields: [String: String] = [:]) {
        self.status = status
        self.fields = Dictionary(
            fields.map { ($0.lowercased(), $1) }, uniquingKeysWith: { first, _ in first })
    }

    init(_ response: HTTPURLResponse) {
        var fields: [String: String] = [:]
        for case (let name as String, let value as String) in response.allHeaderFields {
            fields[name] = value
        }
        self.init(status: response.statusCode, fields: fields)
    }

    /// A header's value; names are the same in any case.
    subscript(_ name: String) -> String? {
        fields[name.lowercased()]
    }
}

/// What arrives of a reply: its head, then its bytes.
enum Arrival: Sendable {
    case head(Head)
    case bytes(Data)
}

/// A request under way; whoever drops it, or is cancelled waiting for it, closes the connection.
typealias Transfer = AsyncThrowingStream<Arrival, any Error>

extension Transfer {
    /// Sends a request.
    static func of(_ request: URLRequest) -> Transfer {
        Transfer { Connections.shared.send(request, $0) }
    }
}

extension Transfer.AsyncIterator {
    /// What arrives next, nil behind the last; `CancellationError` in a cancelled task, where
    /// the end or the fault of the connection only follows from that.
    fileprivate mutating func arrival() async throws -> Arrival? {
        do {
            let arrival = try await next()
            if arrival == nil { try Task.checkCancellation() }
            return arrival
        } catch {
            try Task.checkCancellation()
            throw error
        }
    }
}

/// A reply whose head has come.
struct Reply {
    let head: Head
    private var arrivals: Transfer.AsyncIterator

    /// Waits for the head.
    ///
    /// - Throws: ``MM1Error``; `refused` for all but 2xx.
    init(_ transfer: Transfer) async throws {
        try await self.init(any: transfer)
        guard 200..<300 ~= head.status else {
            throw MM1Error.refused(Refusal(head, body: try await rest()))
        }
    }

    /// Waits for a head of any status.
    init(any transfer: Transfer) async throws {
        arrivals = transfer.makeAsyncIterator()
        switch try await arrivals.arrival() {
        case .head(let head): self.head = head
        case .bytes: throw MM1Error.malformed("bytes before a status")
        case nil: throw MM1Error.unreachable("the connection was closed without a reply")
        }
    }

    /// The next bytes, nil behind the last.
    mutating func next() async throws -> Data? {
        switch try await arrivals.arrival() {
        case .bytes(let data): return data
        case .head: throw MM1Error.malformed("two statuses")
        case nil: return nil
        }
    }

    /// All bytes that have not been taken.
    mutating func rest() async throws -> Data {
        var body = Data()
        while let data = try await next() { body += data }
        return body
    }
}

/// The requests under way, by a data task's delegate: `URLSession.bytes` is not on Linux.
///
/// One session for the app, which never ends: ending one while its tasks end crashes there.
/// Source: swift-corelibs-foundation, issue 4791.
private final class Connections: NSObject, URLSessionDataDelegate, @unchecked Sendable {
    static let shared = Connections()

    private let lock = NSLock()
    private var arrivals: [Int: Transfer.Continuation] = [:]
    private lazy var session = URLSession(
        configuration: Self.plain, delegate: self, delegateQueue: nil)

    /// Remembers nothing, and goes through no proxy: the key is for one server.
    private static var plain: URLSessionConfiguration {
        let plain = URLSessionConfiguration.ephemeral
        plain.connectionProxyDictionary = [:]
        plain.httpShouldSetCookies = false
        plain.urlCache = nil
        // A stream holds its connection; others would wait behind the usual six.
        plain.httpMaximumConnectionsPerHost = 256
        return plain
    }

    func send(_ request: URLRequest, _ continuation: Transfer.Continuation) {
        let task = lock.withLock {
            let task = session.dataTask(with: request)
            arrivals[task.taskIdentifier] = continuation
            return task
        }
        continuation.onTermination = { end in
            if case .cancelled = end { task.cancel() }
        }
        task.resume()
    }

    private func continuation(of task: URLSessionTask) -> Transfer.Continuation? {
        lock.withLock { arrivals[task.taskIdentifier] }
    }

    func urlSession(
        _ session: URLSession, dataTask: URLSessionDataTask, didReceive response: URLResponse,
        completionHandler: @escaping (URLSession.ResponseDisposition) -> Void
    ) {
        if let response = response as? HTTPURLResponse {
            continuation(of: dataTask)?.yield(.head(Head(response)))
        }
        completionHandler(.allow)
    }

    func urlSession(_ session: URLSession, dataTask: URLSessionDataTask, didReceive data: Data) {
        continuation(of: dataTask)?.yield(.bytes(data))
    }

    func urlSession(
        _ session: URLSession, task: URLSessionTask,
        willPerformHTTPRedirection response: HTTPURLResponse, newRequest request: URLRequest,
        completionHandler: @escaping (URLRequest?) -> Void
    ) {
        // The key would go along.
        completionHandler(nil)
    }

    func urlSession(
        _ session: URLSession, task: URLSessionTask, didCompleteWithError error: (any Error)?
    ) {
        let ended = lock.withLock { arrivals.removeValue(forKey: task.taskIdentifier) }
        guard let error else {
            ended?.finish()
            return
        }
        let reason = error.localizedDescription
        ended?.finish(
            throwing: task.response == nil
                ? MM1Error.unreachable(reason) : MM1Error.interrupted(reason))
    }
}
