"""A small in-memory server that speaks those parts of the Hub protocol that huggingface_hub uses for models."""

import base64
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

REPO = r'(?P<repo>[\w.-]+/[\w.-]+)'
LFS_SUFFIX = ('.safetensors', '.bin', '.pth', '.pt', '.npz', '.onnx', '.gguf')
LFS_MIN = 10 * 1024 * 1024


def git_sha(kind, data):
    return hashlib.sha1(b'%s %d\0' % (kind.encode(), len(data)) + data).hexdigest()


class Entry:
    def __init__(self, data, lfs):
        self.data, self.size, self.lfs = data, len(data), lfs
        self.sha256 = hashlib.sha256(data).hexdigest()
        pointer = f'version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n'.encode()
        self.pointer_size = len(pointer)
        self.oid = git_sha('blob', pointer if lfs else data)
        self.etag = self.sha256 if lfs else self.oid


class Hub:
    token, user = 'hf_test', 'me'

    def __init__(self):
        self.repos, self.store, self.faults = {}, {}, []
        self.lock = threading.RLock()

    def create(self, repo, private=False):
        first = {'id': git_sha('commit', repo.encode()), 'title': 'initial commit', 'tree': {}, 'date': time.time()}
        self.repos[repo] = {
            'private': private,
            'refs': {'main': first['id']},
            'commits': {first['id']: first},
            'created': time.time(),
        }

    def commit(self, repo, ref, parent, tree, title=''):
        """Adds a commit of a whole tree after another one, and lets a branch or a pull request point to it."""
        content = json.dumps(sorted((path, entry.oid) for path, entry in tree.items())) + str(time.time_ns())
        oid = git_sha('commit', (parent['id'] + content).encode())
        r = self.repos[repo]
        r['commits'][oid] = {'id': oid, 'title': title, 'tree': tree, 'date': time.time()}
        r['refs'][ref] = oid
        return oid


class HTTPError(Exception):
    def __init__(self, status, code=None, message='', headers=None):
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}


def iso(t):
    return time.strftime('%Y-%m-%dT%H:%M:%S.000Z', time.gmtime(t))


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    server_version = 'minihub'
    routes = [
        ('POST', r'/api/repos/create$', 'create_repo'),
        ('POST', r'/api/validate-yaml$', 'validate_yaml'),
        ('POST', rf'/api/models/{REPO}/preupload/(?P<rev>[^/]+)$', 'preupload'),
        ('POST', rf'/{REPO}\.git/info/lfs/objects/batch$', 'lfs_batch'),
        ('PUT', r'/_lfs/(?P<oid>[0-9a-f]{64})$', 'lfs_put'),
        ('POST', r'/_lfs/verify$', 'lfs_verify'),
        ('GET', r'/_lfs/(?P<oid>[0-9a-f]{64})$', 'lfs_get'),
        ('HEAD', r'/_lfs/(?P<oid>[0-9a-f]{64})$', 'lfs_get'),
        ('POST', rf'/api/models/{REPO}/commit/(?P<rev>[^/]+)$', 'commit'),
        ('GET', rf'/api/models/{REPO}/tree/(?P<rev>[^/]+)(?:/(?P<path>.+))?$', 'tree'),
        ('GET', rf'/api/models/{REPO}(?:/revision/(?P<rev>[^/]+))?$', 'info'),
        ('GET', rf'/{REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)$', 'resolve'),
        ('HEAD', rf'/{REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)$', 'resolve'),
    ]

    @property
    def hub(self):
        return self.server.hub

    @property
    def base(self):
        return 'http://' + self.headers['Host']

    def log_message(self, *args):
        pass

    def dispatch(self):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = (
            self.rfile.read(int(self.headers.get('Content-Length') or 0)) if self.command in ('POST', 'PUT') else b''
        )
        if self.headers.get('Transfer-Encoding') == 'chunked':
            self.body = self.read_chunked()
        try:
            for fault in list(self.hub.faults):
                if fault(self):
                    return
            for method, pattern, name in self.routes:
                m = re.match(pattern, url.path)
                if m and method == self.command:
                    args = {k: unquote(v) if v else v for k, v in m.groupdict().items()}
                    with self.hub.lock:
                        return getattr(self, name)(**args)
            raise HTTPError(404, message='no such route')
        except HTTPError as e:
            headers = dict(e.headers)
            if e.code:
                headers['X-Error-Code'] = e.code
            if e.message:
                headers['X-Error-Message'] = e.message
            self.send(e.status, json.dumps({'error': e.message}).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = dispatch

    def read_chunked(self):
        out = b''
        while n := int(self.rfile.readline().split(b';')[0], 16):
            out += self.rfile.read(n)
            self.rfile.readline()
        self.rfile.readline()
        return out

    def send(self, status, body=b'', headers=None, ctype='application/json', length=None):
        self.send_response(status)
        for k, v in {'Content-Type': ctype, **(headers or {})}.items():
            self.send_header(k, v)
        self.send_header('Content-Length', str(len(body) if length is None else length))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def json(self, obj, status=200, headers=None):
        self.send(status, json.dumps(obj).encode(), headers)

    # ---- helpers
    def authed(self):
        return self.headers.get('Authorization') == f'Bearer {self.hub.token}'

    def need_auth(self):
        if not self.authed():
            raise HTTPError(401, message='Invalid username or password.')

    def get_repo(self, repo):
        r = self.hub.repos.get(repo)
        if r is None or (r['private'] and not self.authed()):
            # the client maps a bare 401 to RepositoryNotFoundError only for https URLs, so always send the code
            if not self.authed():
                raise HTTPError(401, 'RepoNotFound', 'Invalid username or password.')
            raise HTTPError(404, 'RepoNotFound', 'Repository not found')
        return r

    def get_commit(self, repo, rev):
        r = self.get_repo(repo)
        oid = r['refs'].get(rev or 'main', rev)
        if oid not in r['commits']:
            raise HTTPError(404, 'RevisionNotFound', f'Invalid rev id: {rev}')
        return r, r['commits'][oid]

    # ---- endpoints
    def create_repo(self):
        self.need_auth()
        p = json.loads(self.body)
        repo = f'{p.get("organization") or self.hub.user}/{p["name"]}'
        if repo.split('/')[0] != self.hub.user:
            raise HTTPError(
                403, message=f'You don\'t have the rights to create a model under the namespace "{repo.split("/")[0]}"'
            )
        out = {'url': f'{self.base}/{repo}', 'name': repo, 'id': repo}
        if repo in self.hub.repos:
            return self.json({'error': 'You already created this model repo', **out}, 409)
        self.hub.create(repo, private=p.get('private') or p.get('visibility') == 'private')
        self.json(out)

    def validate_yaml(self):
        content = json.loads(self.body)['content']
        warns = [] if content.startswith('---') else [{'message': 'empty or missing yaml metadata in repo card'}]
        self.json({'errors': [], 'warnings': warns})

    def preupload(self, repo, rev):
        self.need_auth()
        _, commit = self.get_commit(repo, rev)
        files = []
        for f in json.loads(self.body)['files']:
            lfs = f['path'].endswith(LFS_SUFFIX) or f['size'] > LFS_MIN
            cur = commit['tree'].get(f['path'])
            files.append(
                {
                    'path': f['path'],
                    'uploadMode': 'lfs' if lfs else 'regular',
                    'shouldIgnore': False,
                    'oid': cur.etag if cur else None,
                }
            )
        self.json({'files': files, 'commitOid': commit['id']})

    def lfs_batch(self, repo):
        self.need_auth()
        self.get_repo(repo)
        objects = []
        for o in json.loads(self.body)['objects']:
            out = {'oid': o['oid'], 'size': o['size'], 'authenticated': True}
            if o['oid'] not in self.hub.store:
                out['actions'] = {
                    'upload': {'href': f'{self.base}/_lfs/{o["oid"]}'},
                    'verify': {'href': f'{self.base}/_lfs/verify'},
                }
            objects.append(out)
        self.send(
            200, json.dumps({'transfer': 'basic', 'objects': objects}).encode(), ctype='application/vnd.git-lfs+json'
        )

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HTTPError(400, message='sha256 mismatch')
        self.hub.store[oid] = self.body
        self.send(200, b'', {'ETag': f'"{hashlib.md5(self.body).hexdigest()}"'})

    def lfs_verify(self):
        p = json.loads(self.body)
        if len(self.hub.store.get(p['oid'], b'')) != p['size']:
            raise HTTPError(404, message='object not stored')
        self.json({})

    def lfs_get(self, oid):
        self.send_bytes(self.hub.store[oid], {'ETag': f'"{oid}"'})

    def send_bytes(self, data, headers):
        headers = {'Accept-Ranges': 'bytes', **headers}
        if m := re.match(r'bytes=(\d+)-(\d*)', self.headers.get('Range') or ''):
            a, b = int(m[1]), int(m[2] or len(data) - 1)
            headers['Content-Range'] = f'bytes {a}-{b}/{len(data)}'
            return self.send(206, data[a : b + 1], headers, 'application/octet-stream')
        self.send(200, data, headers, 'application/octet-stream')

    def commit(self, repo, rev):
        self.need_auth()
        r, parent = self.get_commit(repo, rev)
        header, tree = {}, dict(parent['tree'])
        for line in self.body.splitlines():
            item = json.loads(line)
            key, v = item['key'], item['value']
            if key == 'header':
                header = v
                if v.get('parentCommit') not in (None, parent['id']):
                    raise HTTPError(412, message='A commit has happened since. Please refresh and try again.')
            elif key == 'file':
                assert v['encoding'] == 'base64'
                tree[v['path']] = Entry(base64.b64decode(v['content']), lfs=False)
            elif key == 'lfsFile':
                if v['oid'] not in self.hub.store:
                    raise HTTPError(400, message=f'lfs object {v["oid"]} was not uploaded')
                tree[v['path']] = Entry(self.hub.store[v['oid']], lfs=True)
            elif key == 'deletedFile':
                if tree.pop(v['path'], None) is None:
                    raise HTTPError(404, 'EntryNotFound', "A file with this name doesn't exist")
            elif key == 'deletedFolder':
                tree = {p: e for p, e in tree.items() if not p.startswith(v['path'].rstrip('/') + '/')}
        pull_request = {}
        if self.query.get('create_pr') == ['1']:  # the branch stays where it is
            number = 1 + sum(ref.startswith('refs/pr/') for ref in r['refs'])
            rev = f'refs/pr/{number}'
            pull_request = {'pullRequestUrl': f'{self.base}/{repo}/discussions/{number}'}
        oid = self.hub.commit(repo, rev, parent, tree, header.get('summary', ''))
        url = f'{self.base}/{repo}/commit/{oid}'
        self.json({'success': True, 'commitOid': oid, 'commitUrl': url, 'hookOutput': '', **pull_request})

    def file_info(self, path, e):
        d = {'type': 'file', 'oid': e.oid, 'size': e.size, 'path': path}
        if e.lfs:
            d['lfs'] = {'oid': e.sha256, 'size': e.size, 'pointerSize': e.pointer_size}
        return d

    def tree(self, repo, rev, path=None):
        _, c = self.get_commit(repo, rev)
        prefix = path.rstrip('/') + '/' if path else ''
        recursive = self.query.get('recursive', ['false'])[0].lower() == 'true'
        out, dirs = [], set()
        for p, e in sorted(c['tree'].items()):
            if not p.startswith(prefix):
                continue
            rest = p[len(prefix) :].split('/')
            for i in range(1, len(rest) if recursive else min(2, len(rest))):
                d = prefix + '/'.join(rest[:i])
                if d not in dirs:
                    dirs.add(d)
                    out.append({'type': 'directory', 'oid': git_sha('tree', d.encode()), 'size': 0, 'path': d})
            if recursive or len(rest) == 1:
                out.append(self.file_info(p, e))
        self.json(out)

    def info(self, repo, rev=None):
        r, c = self.get_commit(repo, rev)
        blobs = 'blobs' in self.query
        sib = []
        for p, e in sorted(c['tree'].items()):
            s = {'rfilename': p}
            if blobs:
                s.update(size=e.size, blobId=e.oid)
                if e.lfs:
                    s['lfs'] = {'sha256': e.sha256, 'size': e.size, 'pointerSize': e.pointer_size}
            sib.append(s)
        self.json(
            {
                '_id': '0' * 24,
                'id': repo,
                'modelId': repo,
                'author': repo.split('/')[0],
                'sha': c['id'],
                'lastModified': iso(c['date']),
                'createdAt': iso(r['created']),
                'private': r['private'],
                'gated': False,
                'disabled': False,
                'downloads': 0,
                'likes': 0,
                'tags': [],
                'siblings': sib,
            }
        )

    def resolve(self, repo, rev, path):
        _, c = self.get_commit(repo, rev)
        common = {
            'X-Repo-Commit': c['id'],
            'Access-Control-Expose-Headers': 'X-Repo-Commit,X-Linked-Size,X-Linked-ETag',
        }
        e = c['tree'].get(path)
        if e is None:
            raise HTTPError(404, 'EntryNotFound', 'Entry not found', common)
        if e.lfs:
            cdn = self.server.cdn_base or self.base
            common |= {
                'Location': f'{cdn}/_lfs/{e.sha256}',
                'X-Linked-Size': str(e.size),
                'X-Linked-ETag': f'"{e.sha256}"',
            }
            return self.send(302, b'Found. Redirecting', common, 'text/plain')
        self.send_bytes(e.data, common | {'ETag': f'"{e.oid}"'})


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub=None):
        super().__init__(('127.0.0.1', 0), Handler)
        self.hub, self.cdn_base = hub or Hub(), None

    @property
    def url(self):
        return f'http://127.0.0.1:{self.server_address[1]}'
